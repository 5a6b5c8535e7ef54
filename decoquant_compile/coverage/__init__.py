"""Coverage: which attentions of which architectures and hand-written styles are rewritten, and why the others are not.

``python -m decoquant_compile.coverage`` prints the table; `architectures` makes tiny random models of every decoder and
encoder-decoder of transformers, `idioms` holds models written by hand, `cells` measures one of them in one way of use,
`report` puts cells into tables.
"""
