"""GeoTIFF to valid, physical chips; knows no torch."""
