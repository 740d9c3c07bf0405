"""Self-supervised pretraining and honest evaluation for multispectral satellite imagery."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names, imported on first use so that `--help` never waits for torch.
_HOMES = {
    "CachedFeaturesDataset": "ssl_geo.probing.probe",
    "DINOHead": "ssl_geo.methods.dino",
    "DINOLoss": "ssl_geo.methods.dino",
    "GPUTensorCache": "ssl_geo.probing.probe",
    "MultiCropWrapper": "ssl_geo.methods.dino",
    "SegmentationProbe": "ssl_geo.probing.probe",
    "load_backbone": "ssl_geo.backbones",
}

__all__ = [
    "CachedFeaturesDataset",
    "DINOHead",
    "DINOLoss",
    "GPUTensorCache",
    "MultiCropWrapper",
    "SegmentationProbe",
    "load_backbone",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ssl_geo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
