"""Structure of KV caches and attention in compiled graphs: movement, write forms, attention cores, sites."""
