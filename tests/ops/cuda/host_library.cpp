// The kernels of csrc/ on a CPU, for ctypes: test_cuda_on_host.py. Each function returns 0, or 1 and leaves
// `error`.
#include <string>

#include "top_k.cu"

namespace {

std::string message;

template <typename Run>
int guarded(bool half, int backwards, Run run) {
  cuda_on_host::backwards = backwards != 0;
  try {
    half ? run(__nv_bfloat16()) : run(float());
    return 0;
  } catch (const std::exception& failure) {
    message = failure.what();
    return 1;
  }
}

// Every thread reads what the next one wrote, after a barrier or, wrongly, without.
struct Neighbours {
  float* out;
  int barrier;
};

void read_neighbours(Neighbours a) {
  DYNAMIC_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = float(threadIdx.x);
  if (a.barrier) __syncthreads();
  a.out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

void wait_for_some(int) {
  if (threadIdx.x % 2) __syncthreads();
}

}  // namespace

extern "C" {

int neighbours(bool half, int backwards, float* out, int barrier) {
  return guarded(half, backwards, [&](auto) {
    discovla::launch(read_neighbours, dim3(1), 64, 256, nullptr, Neighbours{out, barrier});
  });
}

int barrier_for_some() {
  return guarded(false, 0, [](auto) { discovla::launch(wait_for_some, dim3(1), 64, 0, nullptr, 0); });
}

const char* error() {
  return message.c_str();
}

int top_k(bool half, int backwards, const void* query, const void* items, const int64_t* group,
          uint64_t* lists, float* values, int64_t* indices, int n, int m, int width, int k, int chunks) {
  return guarded(half, backwards, [&](auto element) {
    using T = decltype(element);
    discovla::TopKArguments<T> a{static_cast<const T*>(query),
                                 static_cast<const T*>(items),
                                 group,
                                 lists,
                                 values,
                                 indices,
                                 n,
                                 m,
                                 width,
                                 k,
                                 chunks};
    discovla::top_k(a, nullptr);
  });
}

}  // extern "C"
