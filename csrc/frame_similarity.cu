// Frame similarity of a block of pairs, forward and backward: discovla/ops/frame_similarity.py.
#include "tile.cuh"

namespace discovla {

// text: (texts i_parts) width, video: (videos j_parts) width, unit rows. Masks: true on real parts, or null.
// text_best, text_index: (t i) v; video_best, video_index: (t v) j; pools: 5 t v; all null without
// backward.
template <typename T>
struct FrameArguments {
  const T *text, *video;
  const float* scale;
  const bool *text_mask, *video_mask;
  float *similarity, *text_best, *video_best, *pools;
  int16_t *text_index, *video_index;
  int texts, videos, i_parts, j_parts, width;

  __host__ __device__ bool text_real(int64_t row) const { return !text_mask || text_mask[row]; }
  __host__ __device__ bool video_real(int64_t row) const { return !video_mask || video_mask[row]; }
};

// An online softmax-weighted mean: weights exp(logit), relative to the largest logit so far.
struct Pool {
  float top = -1e30f, total = 0, mean = 0, squares = 0;  // squares: of the distances from the mean

  __host__ __device__ void add(float value, float logit) {
    const float new_top = logit > top ? logit : top;
    const float keep = expf(top - new_top), weight = expf(logit - new_top);
    const float distance = value - mean;
    top = new_top;
    total = total * keep + weight;
    mean += distance * weight / total;
    squares = squares * keep + weight * distance * (value - mean);
  }

  __host__ __device__ float variance() const { return total == 0 ? 0 : squares / total; }
  __host__ __device__ float lse() const { return top + logf(total == 0 ? 1 : total); }
};

struct Best {
  float value = -2;  // below any cosine
  int index = -1;

  __host__ __device__ void offer(float other, int place) {
    if (other > value) value = other, index = place;  // of equal ones the lowest index stays
  }
};

// G = (sum_i p_i softmax_i(s p_i) + sum_j q_j softmax_j(s q_j)) / 2, p_i = max_j R_ij, q_j = max_i R_ij.
//
// Block: as many whole texts and videos as have Products::ROWS and COLUMNS parts (8 x 8 of 12 in 96 x 96),
// their products in shared memory. A thread then takes one pair and one side: maxima part by part into an
// online softmax, in registers. Traffic: texts are loaded videos / (COLUMNS / j_parts) times, videos texts /
// (ROWS / i_parts) times, mostly from L2; written are 4 t v bytes, and for backward p, q and their indices (6
// bytes each) and five sums.
template <typename T, typename Products>
__global__ void __launch_bounds__(Products::THREADS) frame_similarity_forward(FrameArguments<T> a) {
  DYNAMIC_SHARED(memory);
  constexpr int PAIRS = Products::THREADS / 2;  // at once: one half of the threads for each side
  __shared__ float of_videos[3][PAIRS];         // mean, log-sum-exp and variance
  const int across = Products::COLUMNS / a.j_parts, down = Products::ROWS / a.i_parts;
  const int blocks_across = ceil_div(a.videos, across);
  const int64_t t0 = int64_t(blockIdx.x / blocks_across) * down,
                v0 = int64_t(blockIdx.x % blocks_across) * across;
  const auto text_row = [&](int r) {
    const int64_t row = t0 * a.i_parts + r;
    return r < down * a.i_parts && row < int64_t(a.texts) * a.i_parts ? row : int64_t(-1);
  };
  const auto video_row = [&](int c) {
    const int64_t row = v0 * a.j_parts + c;
    return c < across * a.j_parts && row < int64_t(a.videos) * a.j_parts ? row : int64_t(-1);
  };
  const float* products = Products::product(a.text, text_row, a.video, video_row, a.width, memory);
  const float scale = *a.scale;
  const int side = threadIdx.x / PAIRS, slot = threadIdx.x % PAIRS;
  for (int base = 0; base < down * across; base += PAIRS) {
    const int local = base + slot, lt = local / across, lv = local % across;
    const int64_t t = t0 + lt, v = v0 + lv, pair = t * a.videos + v;
    const bool active = local < down * across && t < a.texts && v < a.videos;
    const float* block = products + lt * a.i_parts * Products::OUT_PITCH + lv * a.j_parts;
    Pool pool;
    if (active && side == 0) {
      for (int i = 0; i < a.i_parts; ++i) {
        const int64_t row = t * a.i_parts + i;
        Best best;
        for (int j = 0; j < a.j_parts; ++j)
          if (a.video_real(v * a.j_parts + j)) best.offer(block[i * Products::OUT_PITCH + j], j);
        if (a.text_real(row)) pool.add(best.value, scale * best.value);
        if (a.pools)
          a.text_best[row * a.videos + v] = best.value, a.text_index[row * a.videos + v] = best.index;
      }
    } else if (active) {
      for (int j = 0; j < a.j_parts; ++j) {
        Best best;
        for (int i = 0; i < a.i_parts; ++i)
          if (a.text_real(t * a.i_parts + i)) best.offer(block[i * Products::OUT_PITCH + j], i);
        if (a.video_real(v * a.j_parts + j)) pool.add(best.value, scale * best.value);
        if (a.pools)
          a.video_best[pair * a.j_parts + j] = best.value, a.video_index[pair * a.j_parts + j] = best.index;
      }
    }
    if (side == 1) {
      of_videos[0][slot] = pool.mean, of_videos[1][slot] = pool.lse(), of_videos[2][slot] = pool.variance();
    }
    __syncthreads();
    if (active && side == 0) {
      const int64_t all = int64_t(a.texts) * a.videos;
      a.similarity[pair] = 0.5f * (pool.mean + of_videos[0][slot]);
      if (a.pools) {
        a.pools[pair] = pool.mean, a.pools[all + pair] = pool.lse();
        a.pools[2 * all + pair] = of_videos[0][slot], a.pools[3 * all + pair] = of_videos[1][slot];
        a.pools[4 * all + pair] = 0.5f * (pool.variance() + of_videos[2][slot]);
      }
    }
    __syncthreads();
  }
}

// grad: t v. derivative: (t i) (v j), by the products of parts. The rest: as written by forward.
template <typename T>
struct FrameGradients {
  FrameArguments<T> kept;
  const float* grad;
  T* derivative;

  // dR_ij = dG / 2 (w_i (1 + s (p_i - mean)) [j = argmax_i] + the same of q); w_i = exp(s p_i - lse).
  __host__ __device__ float at(int64_t row, int64_t column) const {
    const FrameArguments<T>& a = kept;
    const int64_t t = row / a.i_parts, v = column / a.j_parts, pair = t * a.videos + v;
    const int64_t all = int64_t(a.texts) * a.videos, of_text = row * a.videos + v;
    const int64_t of_video = pair * a.j_parts + column % a.j_parts;
    float sum = 0;
    if (a.text_index[of_text] == column % a.j_parts && a.text_real(row))
      sum += slope(a.text_best[of_text], a.pools[pair], a.pools[all + pair]);
    if (a.video_index[of_video] == row % a.i_parts && a.video_real(column))
      sum += slope(a.video_best[of_video], a.pools[2 * all + pair], a.pools[3 * all + pair]);
    return 0.5f * grad[pair] * sum;
  }

  __host__ __device__ float slope(float best, float mean, float lse) const {
    const float scale = *kept.scale;
    return expf(scale * best - lse) * (1 + scale * (best - mean));
  }
};

// The derivative by all products of a block of pairs, dense, for two matrix products. Elements are
// independent. Traffic: T V I J elements written, T V (6 (I + J) + 24) bytes read.
template <typename T>
__global__ void frame_similarity_backward(FrameGradients<T> a) {
  const int64_t columns = int64_t(a.kept.videos) * a.kept.j_parts,
                all = columns * a.kept.texts * a.kept.i_parts;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < all; e += stride)
    a.derivative[e] = T(a.at(e / columns, e % columns));
}

template <typename T>
using FrameTile = Tile<T, 96, 96, 3, 2>;
template <typename T>
using LongFrameTile = Tile<T, 144, 144, 3, 3>;  // where a text or a video has more parts than 96

template <typename T>
void frame_similarity(FrameArguments<T> a, cudaStream_t stream) {
  const auto run = [&](auto products) {
    using Products = decltype(products);
    const int64_t blocks = int64_t(ceil_div(a.texts, Products::ROWS / a.i_parts)) *
                           ceil_div(a.videos, Products::COLUMNS / a.j_parts);
    launch(frame_similarity_forward<T, Products>, dim3(unsigned(blocks)), Products::THREADS, Products::BYTES,
           stream, a);
  };
  if (a.i_parts <= FrameTile<T>::ROWS && a.j_parts <= FrameTile<T>::COLUMNS) {
    run(FrameTile<T>{});
  } else {
    run(LongFrameTile<T>{});
  }
}

template <typename T>
void frame_similarity_backward(FrameGradients<T> a, cudaStream_t stream) {
  constexpr int THREADS = 256, MOST = 1 << 16;
  const int64_t all = int64_t(a.kept.texts) * a.kept.i_parts * a.kept.videos * a.kept.j_parts;
  const int64_t blocks = ceil_div<int64_t>(all, THREADS);
  void (*kernel)(FrameGradients<T>) = frame_similarity_backward<T>;
  launch(kernel, dim3(unsigned(blocks < MOST ? blocks : MOST)), THREADS, 0, stream, a);
}

template void frame_similarity(FrameArguments<float>, cudaStream_t);
template void frame_similarity(FrameArguments<__nv_bfloat16>, cudaStream_t);
template void frame_similarity_backward(FrameGradients<float>, cudaStream_t);
template void frame_similarity_backward(FrameGradients<__nv_bfloat16>, cudaStream_t);

}  // namespace discovla

#ifdef REGISTER_OPS
#include "library.cuh"

namespace discovla {
namespace {

constexpr int MAX_PARTS = LongFrameTile<float>::ROWS;

struct Parts {
  int64_t texts, i_parts, videos, j_parts;

  Parts(const Tensor& text, const Tensor& video) {
    STD_TORCH_CHECK(text.dim() == 3 && video.dim() == 3, "text and video: expected t i d and v j d");
    texts = text.size(0), i_parts = text.size(1), videos = video.size(0), j_parts = video.size(1);
    STD_TORCH_CHECK(i_parts >= 1 && i_parts <= MAX_PARTS && j_parts >= 1 && j_parts <= MAX_PARTS,
                    "text and video: expected 1..", MAX_PARTS, " parts, found ", i_parts, " and ", j_parts);
  }
};

template <typename T>
FrameArguments<T> arguments(const Tensor& text, const Tensor& video, const Tensor& scale,
                            const std::optional<Tensor>& text_mask, const std::optional<Tensor>& video_mask) {
  const Parts parts(text, video);
  expect("scale", scale, {}, ScalarType::Float, text);
  if (text_mask) expect("text_mask", *text_mask, {parts.texts, parts.i_parts}, ScalarType::Bool, text);
  if (video_mask) expect("video_mask", *video_mask, {parts.videos, parts.j_parts}, ScalarType::Bool, text);
  FrameArguments<T> a{};
  a.text = pointer<T>(text), a.video = pointer<T>(video), a.scale = pointer<float>(scale);
  a.text_mask = pointer<bool>(text_mask), a.video_mask = pointer<bool>(video_mask);
  a.texts = int(parts.texts), a.i_parts = int(parts.i_parts), a.videos = int(parts.videos);
  a.j_parts = int(parts.j_parts), a.width = int(text.size(2));
  return a;
}

using Kept = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// similarity t v, text_best and text_index t i v, video_best and video_index t v j, pools 5 t v: mean and
// log-sum-exp of the text's side, of the video's, and the mean of both variances, which is dG / ds. All but
// the first are empty without `keep`.
Kept frame_similarity_cuda(Tensor text, Tensor video, Tensor scale, std::optional<Tensor> text_mask,
                           std::optional<Tensor> video_mask, bool keep) {
  const Parts p(text, video);
  expect_rows(text, video);
  const Guard guard(text.get_device_index());
  const int64_t t = keep ? p.texts : 0, v = keep ? p.videos : 0;
  const auto fresh = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(text, shape, type);
  };
  Tensor similarity = fresh({p.texts, p.videos}, ScalarType::Float);
  Tensor text_best = fresh({t, p.i_parts, v}, ScalarType::Float),
         text_index = fresh({t, p.i_parts, v}, ScalarType::Short);
  Tensor video_best = fresh({t, v, p.j_parts}, ScalarType::Float),
         video_index = fresh({t, v, p.j_parts}, ScalarType::Short);
  Tensor pools = fresh({5, t, v}, ScalarType::Float);
  for_rows(text, [&](auto element) {
    using T = decltype(element);
    FrameArguments<T> a = arguments<T>(text, video, scale, text_mask, video_mask);
    a.similarity = pointer<float>(similarity);
    if (keep) {
      a.text_best = pointer<float>(text_best), a.text_index = pointer<int16_t>(text_index);
      a.video_best = pointer<float>(video_best), a.video_index = pointer<int16_t>(video_index);
      a.pools = pointer<float>(pools);
    }
    frame_similarity(a, current_stream(text));
  });
  return {similarity, text_best, text_index, video_best, video_index, pools};
}

// (t i) (v j): the derivative by all products, in the dtype of the rows.
Tensor frame_similarity_backward_cuda(Tensor grad, Tensor text, Tensor video, Tensor scale,
                                      std::optional<Tensor> text_mask, std::optional<Tensor> video_mask,
                                      Tensor text_best, Tensor text_index, Tensor video_best,
                                      Tensor video_index, Tensor pools) {
  const Parts p(text, video);
  expect_rows(text, video);
  expect("grad", grad, {p.texts, p.videos}, ScalarType::Float, text);
  expect("text_best", text_best, {p.texts, p.i_parts, p.videos}, ScalarType::Float, text);
  expect("text_index", text_index, {p.texts, p.i_parts, p.videos}, ScalarType::Short, text);
  expect("video_best", video_best, {p.texts, p.videos, p.j_parts}, ScalarType::Float, text);
  expect("video_index", video_index, {p.texts, p.videos, p.j_parts}, ScalarType::Short, text);
  expect("pools", pools, {5, p.texts, p.videos}, ScalarType::Float, text);
  const Guard guard(text.get_device_index());
  Tensor derivative = torch::stable::new_empty(text, {p.texts * p.i_parts, p.videos * p.j_parts});
  for_rows(text, [&](auto element) {
    using T = decltype(element);
    FrameGradients<T> a{arguments<T>(text, video, scale, text_mask, video_mask), pointer<float>(grad),
                        pointer<T>(derivative)};
    a.kept.text_best = pointer<float>(text_best), a.kept.text_index = pointer<int16_t>(text_index);
    a.kept.video_best = pointer<float>(video_best), a.kept.video_index = pointer<int16_t>(video_index);
    a.kept.pools = pointer<float>(pools);
    frame_similarity_backward(a, current_stream(text));
  });
  return derivative;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(discovla, library) {
  library.def(
      "frame_similarity(Tensor text, Tensor video, Tensor scale, Tensor? text_mask, Tensor? video_mask, bool "
      "keep) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "frame_similarity_backward(Tensor grad, Tensor text, Tensor video, Tensor scale, Tensor? text_mask, "
      "Tensor? video_mask, Tensor text_best, Tensor text_index, Tensor video_best, Tensor video_index, "
      "Tensor pools) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(discovla, CUDA, library) {
  library.impl("frame_similarity", TORCH_BOX(&frame_similarity_cuda));
  library.impl("frame_similarity_backward", TORCH_BOX(&frame_similarity_backward_cuda));
}

}  // namespace discovla
#endif
