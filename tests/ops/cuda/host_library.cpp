// The kernels of csrc/ on a CPU, for ctypes: test_cuda_on_host.py. Each function returns 0, or 1 and leaves
// `error`.
#include <string>

#include "frame_similarity.cu"
#include "rank_of_positive.cu"
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

int rank_of_positive(bool half, int backwards, const void* query, const void* items, const int64_t* positive,
                     const int64_t* group, const int64_t* starts, const float* lse, const float* lowest,
                     float scale, float* target, int32_t* counts, int n, int m, int groups, int width,
                     int chunks) {
  return guarded(half, backwards, [&](auto element) {
    using T = decltype(element);
    discovla::RankArguments<T> a{static_cast<const T*>(query),
                                 static_cast<const T*>(items),
                                 positive,
                                 group,
                                 starts,
                                 lse,
                                 lowest,
                                 scale,
                                 target,
                                 counts,
                                 n,
                                 m,
                                 groups,
                                 width,
                                 chunks};
    discovla::rank_of_positive(a, nullptr);
  });
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

// derivative: null for forward.
int frame_similarity(bool half, int backwards, const void* text, const void* video, const float* scale,
                     const bool* text_mask, const bool* video_mask, float* similarity, float* text_best,
                     float* video_best, float* pools, int16_t* text_index, int16_t* video_index, int texts,
                     int videos, int i_parts, int j_parts, int width, const float* grad, void* derivative) {
  return guarded(half, backwards, [&](auto element) {
    using T = decltype(element);
    discovla::FrameArguments<T> a{static_cast<const T*>(text),
                                  static_cast<const T*>(video),
                                  scale,
                                  text_mask,
                                  video_mask,
                                  similarity,
                                  text_best,
                                  video_best,
                                  pools,
                                  text_index,
                                  video_index,
                                  texts,
                                  videos,
                                  i_parts,
                                  j_parts,
                                  width};
    if (derivative) {
      discovla::frame_similarity_backward(discovla::FrameGradients<T>{a, grad, static_cast<T*>(derivative)},
                                          nullptr);
    } else {
      discovla::frame_similarity(a, nullptr);
    }
  });
}

}  // extern "C"
