"""CPU kernels for quantplug on the operators that torch ships."""
