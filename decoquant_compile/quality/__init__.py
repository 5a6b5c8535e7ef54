"""The quality of packed caches: ``python -m decoquant_compile.quality MODEL``.

Windows of real text are decoded, teacher-forced and token by token, through the compiled model on its packed cache;
what is compared are the distributions of the next token, with those of the model on its exact cache. Other codecs for
KV caches run beside it on the same windows, emulated inside the model's attention. Needs the extra ``quality``.
"""
