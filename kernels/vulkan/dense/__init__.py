"""Dense linear algebra on a GPU, and Gemma's layer over it: what calibration is made of.

Matrices are float32, float16 or bytes, their heights and widths multiples of 128: what pads them is
zero, so no product asks where it ends. Products run on cooperative matrices where the device has
them. What is float32 goes through them as two float16 each, x = high + low: three products, with an
error of about 2^-22 of each term.
"""
