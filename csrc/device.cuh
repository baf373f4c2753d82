// CUDA primitives that the kernels use: types, copies, tensor cores, and a launch.
//
// Under nvcc they are those of CUDA. A C++ compiler includes cuda_on_host.h of the tests instead, which runs
// the same kernels on a CPU, thread by thread.
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
#define REGISTER_OPS  // in the host pass only: the others need no torch headers
#endif

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace discovla {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Launches a kernel that takes one struct of arguments.
template <typename Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t bytes, cudaStream_t stream,
            Arguments arguments) {
  if (bytes > 48 * 1024) {  // above the default limit of a kernel
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
