"""The definition of every code, in NumPy: which weights the bits of a pair stand for.

`tile` holds the geometry all codes share, `split` the memoryless 4 + 3 bit code, `trellis` the code with memory.
Every other implementation in the project is tested equal to these modules, bit for bit.
"""
