"""What the adapters share: how a host's words become the signature of an attack."""

from firstorder.hosts.signature import Host, signature

__all__ = ["Host", "signature"]
