// Ranks of the positive groups of items, without the matrix of scores:
// discovla/ops/rank_of_positive.py.
#include "tile.cuh"

namespace discovla {

// query: n width, items: m width, unit rows; items of one group follow one another. positive: n, the
// positive group. group: m, the group of each item, and starts: its first item and m at the end; both null where every
// item is a group. lse: m, of a dual softmax with `scale` and `lowest`; null for cosines. target: n. counts:
// 2 n, from zero.
template <typename T>
struct RankArguments {
  const T *query, *items;
  const int64_t *positive, *group, *starts;
  const float *lse, *lowest;
  float scale;
  float* target;
  int32_t* counts;
  int n, m, groups, width, chunks;

  __host__ __device__ int64_t start(int64_t g) const { return starts ? starts[g] : g; }
  __host__ __device__ int64_t group_of(int64_t item) const { return group ? group[item] : item; }

  // The cosine, or the logarithm of its dual softmax.
  __host__ __device__ float score(float cosine, int64_t item) const {
    if (!lse) return cosine;
    const float logit = scale * cosine;
    return logf(fmaxf(logit - *lowest, 0.0f)) + logit - lse[item];  // log(0) is -infinity: last, as it should
  }
};

template <typename T>
using RankTile = Tile<T, 128, 128, 2, 4>;

// target_i = the best score of query i within its positive group. Tile: 128 queries with one item of each
// query's group; only the diagonal is used, so equal scores come from the same arithmetic as in rank_count.
template <typename T>
__global__ void __launch_bounds__(RankTile<T>::THREADS) rank_target(RankArguments<T> a) {
  DYNAMIC_SHARED(memory);
  using Products = RankTile<T>;
  const int64_t first = int64_t(blockIdx.x) * Products::ROWS;
  const auto query = [&](int r) { return first + r < a.n ? first + r : int64_t(-1); };
  const int64_t own = query(threadIdx.x < Products::ROWS ? threadIdx.x : 0);
  const bool active = threadIdx.x < Products::ROWS && own >= 0;
  int64_t longest = 0;
  for (int r = 0; r < Products::ROWS && first + r < a.n; ++r) {
    const int64_t g = a.positive[first + r], length = a.start(g + 1) - a.start(g);
    longest = length > longest ? length : longest;
  }
  float best = -INFINITY;
  for (int64_t step = 0; step < longest; ++step) {
    const auto item = [&](int r) {
      if (first + r >= a.n) return int64_t(-1);
      const int64_t g = a.positive[first + r], last = a.start(g + 1) - 1, wanted = a.start(g) + step;
      return wanted < last ? wanted : last;  // a short group repeats its last item
    };
    const float* products = Products::product(a.query, query, a.items, item, a.width, memory);
    if (active) {
      const float found =
          a.score(products[threadIdx.x * Products::OUT_PITCH + threadIdx.x], item(threadIdx.x));
      best = found > best ? found : best;
    }
  }
  if (active) a.target[own] = best;
}

// counts_0 += |{groups other than the positive one with a score >= target}|, counts_1 the same with >.
//
// Block: 128 queries and one of `chunks` runs of groups, 128 items after another. A warp takes a query's 128
// scores, 32 at a time, as bits of what reaches and of what exceeds the target. Of a group that spans words
// or tiles the first hit counts: the last group that was hit is kept for each query. Integers are added,
// so the result does not depend on an order. Traffic: N M WIDTH (2 / 128) elements, mostly from L2; 8 N bytes added for each
// chunk.
template <typename T>
__global__ void __launch_bounds__(RankTile<T>::THREADS) rank_count(RankArguments<T> a) {
  DYNAMIC_SHARED(memory);
  using Products = RankTile<T>;
  __shared__ int32_t counted[2][Products::ROWS];
  __shared__ int64_t last[2][Products::ROWS];
  const int64_t first = int64_t(blockIdx.x) * Products::ROWS;
  const int64_t begin = a.start(int64_t(a.groups) * blockIdx.y / a.chunks);
  const int64_t end = a.start(int64_t(a.groups) * (blockIdx.y + 1) / a.chunks);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = threadIdx.x; r < Products::ROWS; r += Products::THREADS)
    for (int kind = 0; kind < 2; ++kind) counted[kind][r] = 0, last[kind][r] = -1;
  const auto query = [&](int r) { return first + r < a.n ? first + r : int64_t(-1); };
  for (int64_t tile = begin; tile < end; tile += Products::COLUMNS) {
    const auto item = [&](int c) { return tile + c < end ? tile + c : int64_t(-1); };
    const float* products = Products::product(a.query, query, a.items, item, a.width, memory);
    for (int r = warp; r < Products::ROWS && first + r < a.n; r += Products::WARPS) {
      const float target = a.target[first + r];
      const int64_t right = a.positive[first + r];
      for (int c = lane; c < Products::COLUMNS; c += 32) {
        const bool there = tile + c < end;
        const int64_t group = there ? a.group_of(tile + c) : -1;
        const float score = there ? a.score(products[r * Products::OUT_PITCH + c], tile + c) : -INFINITY;
        for (int kind = 0; kind < 2; ++kind) {
          const bool hit = there && group != right && (kind == 0 ? score >= target : score > target);
          const unsigned hits = __ballot_sync(EVERY_LANE, hit);
          if (hits == 0) continue;  // of all lanes alike
          const unsigned before = hits & ((1u << lane) - 1);
          const int64_t neighbour = __shfl_sync(EVERY_LANE, group, before ? 31 - __clz(before) : lane);
          const int64_t previous = before ? neighbour : last[kind][r];
          const unsigned fresh = __ballot_sync(EVERY_LANE, hit && group != previous);
          if (lane == 31 - __clz(hits)) {
            counted[kind][r] += __popc(fresh);
            last[kind][r] = group;
          }
          __syncwarp();
        }
      }
    }
  }
  __syncthreads();
  for (int r = threadIdx.x; r < Products::ROWS && first + r < a.n; r += Products::THREADS)
    for (int kind = 0; kind < 2; ++kind)
      atomicAdd(a.counts + int64_t(kind) * a.n + first + r, counted[kind][r]);
}

template <typename T>
void rank_of_positive(RankArguments<T> a, cudaStream_t stream) {
  const int rows = ceil_div(a.n, RankTile<T>::ROWS);
  launch(rank_target<T>, dim3(rows), RankTile<T>::THREADS, RankTile<T>::BYTES, stream, a);
  launch(rank_count<T>, dim3(rows, a.chunks), RankTile<T>::THREADS, RankTile<T>::BYTES, stream, a);
}

template void rank_of_positive(RankArguments<float>, cudaStream_t);
template void rank_of_positive(RankArguments<__nv_bfloat16>, cudaStream_t);

}  // namespace discovla

#ifdef REGISTER_OPS
#include "library.cuh"

namespace discovla {
namespace {

// counts: 2 n, int32: groups other than the positive one that score at least as high, and higher.
Tensor rank_of_positive_cuda(Tensor query, Tensor items, Tensor positive, std::optional<Tensor> group,
                             std::optional<Tensor> starts, std::optional<Tensor> lse,
                             std::optional<Tensor> lowest, double scale) {
  expect_rows(query, items);
  expect("positive", positive, {query.size(0)}, ScalarType::Long, query);
  STD_TORCH_CHECK(group.has_value() == starts.has_value(), "group and starts: give both or none");
  STD_TORCH_CHECK(lse.has_value() == lowest.has_value(), "lse and lowest: give both or none");
  const int64_t groups = starts ? starts->numel() - 1 : items.size(0);
  if (group) {
    expect("group", *group, {items.size(0)}, ScalarType::Long, query);
    expect("starts", *starts, {groups + 1}, ScalarType::Long, query);
  }
  if (lse) {
    expect("lse", *lse, {items.size(0)}, ScalarType::Float, query);
    expect("lowest", *lowest, {}, ScalarType::Float, query);
  }
  const Guard guard(query.get_device_index());
  Tensor target = torch::stable::new_empty(query, {query.size(0)}, ScalarType::Float);
  Tensor counts = torch::stable::new_zeros(query, {2, query.size(0)}, ScalarType::Int);
  for_rows(query, [&](auto element) {
    using T = decltype(element);
    RankArguments<T> a{};
    a.query = pointer<T>(query), a.items = pointer<T>(items), a.positive = pointer<int64_t>(positive);
    a.group = pointer<int64_t>(group), a.starts = pointer<int64_t>(starts);
    a.lse = pointer<float>(lse), a.lowest = pointer<float>(lowest), a.scale = float(scale);
    a.target = pointer<float>(target), a.counts = pointer<int32_t>(counts);
    a.n = int(query.size(0)), a.m = int(items.size(0)), a.groups = int(groups), a.width = int(query.size(1));
    a.chunks = chunks_for(a.n, int(groups), RankTile<T>::ROWS);
    rank_of_positive(a, current_stream(query));
  });
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(discovla, library) {
  library.def(
      "rank_of_positive(Tensor query, Tensor items, Tensor positive, Tensor? group, Tensor? starts, Tensor? "
      "lse, "
      "Tensor? lowest, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(discovla, CUDA, library) {
  library.impl("rank_of_positive", TORCH_BOX(&rank_of_positive_cuda));
}

}  // namespace discovla
#endif
