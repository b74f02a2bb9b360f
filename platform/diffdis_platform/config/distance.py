"""Configuration of a comparison of two existing sets of images."""

from dataclasses import dataclass, field
from typing import Literal

from diffdis_platform.config.evaluate import check_networks
from diffdis_platform.config.parse import check_output_dir
from ray_platform.contracts import ConfigError
from ray_platform.placement import check_labels
from ray_platform.storage_config import StorageConfig

Protocol = Literal["clean-fid", "pytorch-fid", "torch-fidelity"]


@dataclass(frozen=True)
class DistanceConfig:
    """Two sets of images, the networks whose features are compared, and the workers."""

    generated: str = ""
    """Generated images: a folder or tars, local or s3://. Images are used as they are."""
    reference: str = ""
    """Reference images, likewise, or a published .npz with mu and sigma from pytorch-fid or clean-fid."""
    output_dir: str = ""
    """Absolute folder or s3:// URL for distance.json. An interrupted command continues there."""
    networks: tuple[str, ...] = ("inception",)
    """Feature networks: inception (FID), efficientnet_lite0, the folder of a CLIP or DINOv2 in transformers' layout, or
    module:function."""
    inception: str = ""
    """File pt_inception-2015-12-05-6726825d.pth, local or s3://."""
    protocol: Protocol = "clean-fid"
    """Tool whose FID is computed. The tools differ in how images are resized for Inception."""
    num_workers: int = 0
    """Workers. 0: as many as the cluster has resources for."""
    cpus_per_worker: float = 1.0
    """CPUs per worker."""
    gpus_per_worker: float = 0.0
    """GPUs per worker. 0.5: two share a GPU; 0: CPUs only."""
    placement: dict[str, str] = field(default_factory=dict)
    """Labels of the workers' nodes, such as '{"pool": "gpu"}'. Empty: any node."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    def check(self) -> None:
        """Raise ConfigError for a field that is missing or invalid."""
        for name, text in (("generated", self.generated), ("reference", self.reference)):
            if not text:
                raise ConfigError(f"{name}: give a folder of images or tars" + ", or an .npz" * (name == "reference"))
        check_output_dir(self.output_dir)
        check_networks("networks", self.networks)
        if self.num_workers < 0 or self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ConfigError("num_workers and gpus_per_worker: at least 0; cpus_per_worker: above 0")
        check_labels("placement", self.placement)

    def check_weights(self) -> None:
        """Raise ConfigError if Inception's weights are missing. That is best said of sets of images that exist."""
        if "inception" in self.networks and not self.inception:
            raise ConfigError(
                "inception: FID needs the weights pt_inception-2015-12-05-6726825d.pth; without them, use --networks "
                "efficientnet_lite0, whose distance is not called FID"
            )

    @property
    def resize(self) -> str:
        """The name of the protocol's way to resize for Inception."""
        return self.protocol.replace("-", "_")
