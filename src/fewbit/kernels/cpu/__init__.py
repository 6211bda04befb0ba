"""fewbit's own CPU kernels: Python packs the weights, C++ (src/native/cpu/) multiplies, on threads of its own."""
