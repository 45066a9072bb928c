"""The compression methods, one file each; `registry.methods` imports them all."""
