"""What the adapters share: how a host's words become the signature of an attack, and files written whole."""

from firstorder.hosts.signature import Host, signature

__all__ = ["Host", "signature"]
