"""A model's attention, routed through the layers of our caches."""
