"""Self-supervised methods, one file each; know no file and no raster."""
