"""Chip to global and local views; knows no raster."""
