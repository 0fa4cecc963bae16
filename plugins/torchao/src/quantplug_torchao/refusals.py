"""
What is recognised and not read, with the reason: torchao's configurations and the tensor classes that they make.

The names are those of torchao 0.15, 0.17 and 0.18.
"""

from __future__ import annotations

_FLOAT_ZEROS = "its zero points are 16-bit floats that are added after scaling, so that no integer stands for them"
_FOR_ONE_DEVICE = "its codes are in the order of one device's operator"
_OPAQUE = "its bytes are what a library packed for the processor that wrote the file"
_SPARSE = "half of its weights are left out, and which they are is stored in the order of one operator"
_SWIZZLED = "a prototype whose scales may be stored in the order of one operator"
_TABLE = "its codes stand for a table of their own, on no grid that kernels know"
_FIRST_VERSION = "the form of version 1, which torchao never stored in safetensors"
_MEASURED = "the measured scales of x are tensors, which no configuration spells"
_CALIBRATION = "a step of a calibration; the file it ends in has another configuration"
_TRAINING = "a way to train, not a layout"

TENSOR_CLASSES = {
    "Int4Tensor": _FLOAT_ZEROS,
    "Int4TilePackedTo4dTensor": f"{_FOR_ONE_DEVICE}, and {_FLOAT_ZEROS}",
    "Int4PreshuffledTensor": _FOR_ONE_DEVICE,
    "Int4PlainInt32Tensor": _FOR_ONE_DEVICE,
    "Int4MarlinSparseTensor": _SPARSE,
    "Int4OpaqueTensor": _OPAQUE,
    "Float8OpaqueTensor": _OPAQUE,
    "IntxOpaqueTensor": _OPAQUE,
    "MXTensor": _SWIZZLED,
    "NVFP4Tensor": _SWIZZLED,
    "NF4Tensor": _TABLE,
    "Int8LutTensor": _TABLE,
    "CodebookQuantizedTensor": _TABLE,
    "CodebookQuantizedPackedTensor": _TABLE,
    "GGUFQuantizedTensor": "its scales are quantized once more",
    "Float8Sparse2x4_1DData1DMetadataTensor": _SPARSE,
    "Float8Sparse2x4_2DData2DMetadataTensor": _SPARSE,
    "Sparse2x4CUTLASSFloat8Tensor": _SPARSE,
    "AffineQuantizedTensor": _FIRST_VERSION,
    "LinearActivationQuantizedTensor": _FIRST_VERSION,
}
"""Classes that `__metadata__` may name."""

CONFIGURATIONS = {
    "Int4WeightOnlyConfig": f"depending on its packing, {_FOR_ONE_DEVICE} or {_FLOAT_ZEROS}",
    "PrototypeInt4WeightOnlyConfig": _FOR_ONE_DEVICE,
    "Int4WeightOnlyOpaqueTensorConfig": _OPAQUE,
    "Float8DynamicActivationFloat8WeightOpaqueTensorConfig": _OPAQUE,
    "Float8DynamicActivationInt4WeightConfig": f"depending on its packing, {_FOR_ONE_DEVICE} or {_FLOAT_ZEROS}",
    "Int8DynamicActivationInt4WeightConfig": _FIRST_VERSION,
    "Int4DynamicActivationInt4WeightConfig": _FIRST_VERSION,
    "UIntXWeightOnlyConfig": _FIRST_VERSION,
    "UIntxWeightOnlyConfig": "a prototype, whose codes are packed in the order of one library",
    "Int8DynamicActivationUIntxWeightConfig": "a prototype, whose codes are packed in the order of one library",
    "GemliteUIntXWeightOnlyConfig": _FIRST_VERSION,
    "FPXWeightOnlyConfig": "floats of 3 to 7 bits, for which there is no element type here",
    "IntNWeightOnlyConfig": _FIRST_VERSION,
    "StretchedIntxWeightConfig": "its zero points lie between two codes",
    "GroupwiseLutWeightConfig": _TABLE,
    "CodebookWeightOnlyConfig": _TABLE,
    "NF4WeightOnlyConfig": _TABLE,
    "GGUFWeightOnlyConfig": "its scales are quantized once more",
    "Int8StaticActivationInt8WeightConfig": _MEASURED,
    "Float8StaticActivationFloat8WeightConfig": _MEASURED,
    "SemiSparseWeightConfig": _SPARSE,
    "BlockSparseWeightConfig": _SPARSE,
    "Float8DynamicActivationFloat8SemiSparseWeightConfig": _SPARSE,
    "MXDynamicActivationMXWeightConfig": _SWIZZLED,
    "NVFP4DynamicActivationNVFP4WeightConfig": _SWIZZLED,
    "NVFP4WeightOnlyConfig": _SWIZZLED,
    "AWQConfig": _CALIBRATION,
    "SmoothQuantConfig": _CALIBRATION,
    "GPTQConfig": _CALIBRATION,
    "QATConfig": _TRAINING,
    "IntXQuantizationAwareTrainingConfig": _TRAINING,
    "FromIntXQuantizationAwareTrainingConfig": _TRAINING,
}
"""Classes that `quant_type` may name."""
