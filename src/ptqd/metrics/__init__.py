"""Images to numbers with intervals, from features; nothing here knows of quantization.

Pure functions give values; those that end in ``_statistic`` give the influence of each sample too, from which
:mod:`ptqd.metrics.bootstrap` makes intervals and paired differences. In features other than Inception's the Frechet
distance (Heusel et al., arXiv 1706.08500), the same of spatial features (Nash et al., arXiv 2103.03841) and the kernel
distance (Binkowski et al., arXiv 1801.01401) are not FID, sFID or KID, and are never called so.
"""
