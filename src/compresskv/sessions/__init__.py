"""Documents that are read once and asked often: kept, saved, and opened again."""
