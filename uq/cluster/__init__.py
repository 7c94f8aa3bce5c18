"""Work on several machines, over the scheduler and the workers of Dask (extra `cluster`)."""
