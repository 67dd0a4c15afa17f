// How kernels follow each other: on sm_90 and later one is set up while the one before it in the stream still runs.
#pragma once
#include <cuda_runtime.h>

#include <atomic>

namespace hfl {

constexpr int MOST_DEVICES = 64;  // about which something is remembered

// Until all kernels before this one are done; from here on the next one may be set up. Comes before all reads and
// writes of global memory, in every block: then what the kernels before it wait for is done as well. A step of a layer
// reads before that what stands, and again what the step before it may have written.
// `prepared`: any number of at least 0 that comes out of the set-up, which the compiler else puts off until after.
__device__ __forceinline__ void wait_for_previous(int prepared) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nsetp.ge.s32 p, %0, 0;\n@p griddepcontrol.wait;\n}" ::"r"(prepared) : "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same, but that the next one is set up once this one is done: for what writes more of a store than the last few
// tokens, which a step of a layer would take to stand.
__device__ __forceinline__ void wait_alone(int prepared) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nsetp.ge.s32 p, %0, 0;\n@p griddepcontrol.wait;\n}" ::"r"(prepared) : "memory");
#endif
}

// Whether the code that the current device runs waits so. What was compiled for an earlier architecture does not, on
// whatever device it runs; all kernels of the library are compiled for the same ones.
inline bool waits(const void* kernel) {
  static std::atomic<int> known[MOST_DEVICES];  // 0: not known yet, 1: no, 2: yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= MOST_DEVICES) return false;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer) return answer == 2;
  cudaFuncAttributes of_kernel;
  if (cudaFuncGetAttributes(&of_kernel, kernel) != cudaSuccess) return false;
  answer = of_kernel.ptxVersion >= 90 ? 2 : 1;
  known[device].store(answer, std::memory_order_relaxed);
  return answer == 2;
}

// All shared memory that there is. Kernels that follow each other share a multiprocessor only where they agree on how
// much of its memory that is.
inline cudaError_t keep_shared(const void* kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// Launch a kernel that begins with `wait_for_previous`. early: while those before it run; cluster: blocks of one.
inline cudaError_t launch(const void* kernel, dim3 grid, int threads, size_t shared_bytes, void* stream,
                          void** arguments, bool early = true, unsigned cluster = 1) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (cluster > 1) {
    cudaLaunchAttribute& size = attributes[config.numAttrs++];
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = cluster, size.val.clusterDim.y = 1, size.val.clusterDim.z = 1;
  }
  early = early && waits(kernel);
  if (early) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  if (!early || error != cudaErrorNotSupported) return error;
  static_cast<void>(cudaGetLastError());
  --config.numAttrs;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace hfl
