"""What the adapters share: how a host's words become the signature and the parameters of an attack; batches that
travel.
"""

from firstorder.hosts.signature import Host, signature
from firstorder.hosts.steps import relative_step
from firstorder.hosts.transfer import ahead, sent

__all__ = ["Host", "ahead", "relative_step", "sent", "signature"]
