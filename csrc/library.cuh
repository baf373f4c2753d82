// Tensors of LibTorch's stable ABI for launchers: checks, pointers, streams. One library serves every torch
// from 2.11 on.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>

// Weak: torch without CUDA does not have it, and yet the library loads and registers its ops there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace discovla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Guard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch is built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <typename T>
T* pointer(const std::optional<Tensor>& x) {
  return x ? pointer<T>(*x) : nullptr;
}

// Refuses a tensor of another shape, dtype or device, or a strided one: a kernel would read out of bounds.
inline void expect(const char* name, const Tensor& x, std::initializer_list<int64_t> shape, ScalarType type,
                   const Tensor& like) {
  bool fits = x.dim() == int64_t(shape.size()) && x.scalar_type() == type && x.is_contiguous() &&
              x.is_cuda() && x.get_device_index() == like.get_device_index();
  int64_t axis = 0;
  for (int64_t size : shape) fits = fits && x.size(axis++) == size;
  STD_TORCH_CHECK(fits, name, ": not the shape, dtype or device that was expected, or not contiguous");
}

// x and y: rows of one dtype on one GPU, each a multiple of 16 bytes and aligned to that.
inline void expect_rows(const Tensor& x, const Tensor& y) {
  const int64_t width = x.size(x.dim() - 1), bytes = width * int64_t(x.element_size());
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type() && x.get_device_index() == y.get_device_index() &&
                      x.is_contiguous() && y.is_contiguous() && y.size(y.dim() - 1) == width,
                  "rows: expected two contiguous tensors of one dtype, device and width");
  const auto aligned = [](const Tensor& z) { return reinterpret_cast<uintptr_t>(z.data_ptr()) % 16 == 0; };
  STD_TORCH_CHECK(bytes % 16 == 0 && aligned(x) && aligned(y),
                  "rows: expected multiples of 16 bytes, aligned to 16");
  STD_TORCH_CHECK(x.numel() > 0 && y.numel() > 0, "rows: expected at least one on both sides");
  STD_TORCH_CHECK(x.size(0) < (1 << 30) && y.size(0) < (1 << 30), "rows: expected fewer than 2^30");
}

// Calls `run` with an element of the dtype of x.
template <typename Run>
void for_rows(const Tensor& x, Run run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::BFloat16:
      return run(__nv_bfloat16());
    default:
      STD_TORCH_CHECK(false, "rows: expected float32 or bfloat16");
  }
}

// Into how many runs the items are cut, so that a few queries too keep every multiprocessor busy.
inline int chunks_for(int queries, int items, int rows) {
  const int wanted = ceil_div(512, ceil_div(queries, rows)), most = ceil_div(items, 128);
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

}  // namespace discovla
