"""Drawing, in notebooks and in reports: plain arrays in, matplotlib figures out.

Arrays of an image are (C, H, W), in reflectance where nothing else is said; features (D, h, w) or (N, D, h, w).
"""

from ssl_geo.figures.charts import class_bars, confusion_chart, curves, footprints_map, model_chart, training_curves
from ssl_geo.figures.composites import COMPOSITES, composite, default_composite, limits, stretch
from ssl_geo.figures.feature_maps import (
    PCABasis,
    central_place,
    cosine_similarity,
    kmeans_segments,
    nearest_chips,
    pca_basis,
    readable_layer,
    valid_share,
)
from ssl_geo.figures.sheets import (
    attention_sheet,
    band_sheet,
    class_sheet,
    composite_sheet,
    image_sheet,
    nearest_sheet,
    pca_sheet,
    segment_sheet,
    similarity_sheet,
    statistics_chart,
    view_sheet,
)
from ssl_geo.figures.style import as_svg

__all__ = [
    "COMPOSITES",
    "PCABasis",
    "as_svg",
    "attention_sheet",
    "band_sheet",
    "central_place",
    "class_bars",
    "class_sheet",
    "composite",
    "composite_sheet",
    "confusion_chart",
    "cosine_similarity",
    "curves",
    "default_composite",
    "footprints_map",
    "image_sheet",
    "kmeans_segments",
    "limits",
    "model_chart",
    "nearest_chips",
    "nearest_sheet",
    "pca_basis",
    "pca_sheet",
    "readable_layer",
    "segment_sheet",
    "similarity_sheet",
    "statistics_chart",
    "stretch",
    "training_curves",
    "valid_share",
    "view_sheet",
]
