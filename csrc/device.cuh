// What kernels need beside the language: types, copies, tensor cores, and a launch.
//
// nvcc takes them from CUDA. A C++ compiler takes them from cuda_on_host.h of the tests, which runs the same
// kernels, thread by thread, on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_pipeline.h>
#include <mma.h>

#include <stdexcept>
#include <string>

#ifndef __CUDA_ARCH__
#define REGISTER_OPS  // once, in the pass for the host: the others need not read torch's headers
#endif

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace discovla {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// One launch of a kernel that takes one record.
template <typename Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t bytes, cudaStream_t stream,
            Arguments arguments) {
  if (bytes > 48 * 1024) {  // more than any kernel may have unasked
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
          "shared memory");
  }
  kernel<<<grid, threads, bytes, stream>>>(arguments);
  check(cudaGetLastError(), "kernel launch");
}

}  // namespace discovla

#else
#include "cuda_on_host.h"
#endif

namespace discovla {

constexpr unsigned EVERY_LANE = 0xFFFFFFFF;

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer x, Integer y) {
  return (x + y - 1) / y;
}

}  // namespace discovla
