"""Low-bit KV caches for any model, by compiling it."""
