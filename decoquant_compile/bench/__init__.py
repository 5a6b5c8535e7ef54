"""The benchmark: ``python -m decoquant_compile.bench attention``, ``... decode`` and ``... prefill``.

All arms of a comparison run in one process, interleaved call by call, so that whatever else the machine does hits them
alike; what is compared are medians. `attention` measures one attention of one decode step over caches that come from
DRAM, `decode` whole steps of a model, `prefill` whole prompts. Needs the extra ``bench``.
"""
