"""What the adapters share: how a host's words and defaults become the signature of an attack's face."""

from firstorder.hosts.signature import Host, signature

__all__ = ["Host", "signature"]
