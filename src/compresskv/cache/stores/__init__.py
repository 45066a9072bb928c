"""How a layer's retained keys and values are held in memory."""
