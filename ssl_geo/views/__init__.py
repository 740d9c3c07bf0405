"""Chip to global and local views; knows no raster."""

import os

# Importing albumentations would otherwise ask the package index for a newer version: a wait without network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
