// Tensor maps, by which a thread copies a box of a tensor to shared memory.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace hfl {

// The driver's function that makes them; null where it has none.
inline auto tensor_map_maker() {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult how;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &how);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(error == cudaSuccess ? found : nullptr);
  }();
  return encode;
}

// A map of a tensor [B, H, T, D], for boxes of 128 bytes of the channels of some rows, whose chunks of 16 bytes are
// permuted within eight rows; rows from T on are zeros. sizes: D, T, H, B; strides: of T, H and B, in elements of so
// many bytes. False where the driver does not make one.
inline bool map_rows(CUtensorMap& map, CUtensorMapDataType type, int bytes, const void* data,
                     const int64_t (&sizes)[4], const int64_t (&strides)[3], int rows) {
  const auto encode = tensor_map_maker();
  const cuuint64_t each = cuuint64_t(bytes);
  const cuuint64_t counts[4] = {cuuint64_t(sizes[0]), cuuint64_t(sizes[1]), cuuint64_t(sizes[2]), cuuint64_t(sizes[3])};
  const cuuint64_t apart[3] = {cuuint64_t(strides[0]) * each, cuuint64_t(strides[1]) * each,
                               cuuint64_t(strides[2]) * each};
  const cuuint32_t box[4] = {cuuint32_t(128 / bytes), cuuint32_t(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode && encode(&map, type, 4, const_cast<void*>(data), counts, apart, box, steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The same of 16-bit floats.
inline bool map_rows(CUtensorMap& map, bool bf16, const void* data, const int64_t (&sizes)[4],
                     const int64_t (&strides)[3], int rows) {
  const CUtensorMapDataType type = bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return map_rows(map, type, 2, data, sizes, strides, rows);
}

}  // namespace hfl
