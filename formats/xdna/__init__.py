"""Binary formats of AMD XDNA NPUs: xclbin, PDI, CDO and instruction streams.

Byte by byte, and what each part was checked against: `formats/xdna/README.md`.
"""
