"""What the adapters share: how a host's words become the signature and the parameters of an attack."""

from firstorder.hosts.signature import Host, signature
from firstorder.hosts.steps import relative_step

__all__ = ["Host", "relative_step", "signature"]
