// The k best items of every query, without the matrix of scores: discovla/ops/top_k.py.
#include "tile.cuh"

namespace discovla {

// query: n width, items: m width, unit rows. group: m, the group of each item, or null if every item is
// one. lists: n chunks k, scratch. values, indices: n k.
template <typename T>
struct TopKArguments {
  const T *query, *items;
  const int64_t* group;
  uint64_t* lists;
  float* values;
  int64_t* indices;
  int n, m, width, k, chunks;
};

// One integer for a score and an index: it orders by score, and among equal ones the lower index is the
// larger. Above 0, which stands for an empty place.
__host__ __device__ inline uint64_t key_of(float score, uint32_t index) {
  union {
    float number;
    uint32_t bits;
  } as;
  as.number = score + 0.0f;  // -0 equals 0
  const uint32_t ordered = as.bits & 0x80000000u ? ~as.bits : as.bits | 0x80000000u;
  return uint64_t(ordered) << 32 | (0xFFFFFFFFu - index);
}

__host__ __device__ inline uint32_t index_of(uint64_t key) {
  return 0xFFFFFFFFu - uint32_t(key);
}

__host__ __device__ inline float score_of(uint64_t key) {
  union {
    float number;
    uint32_t bits;
  } as;
  const uint32_t ordered = uint32_t(key >> 32);
  as.bits = ordered & 0x80000000u ? ordered & 0x7FFFFFFFu : ~ordered;
  return as.number;
}

// Inserts a key into a descending list of k, by one warp. Of two keys with the same index only the larger
// stays.
__device__ inline void insert(uint64_t* list, int k, uint64_t key) {
  const int lane = threadIdx.x % 32;
  int place = 0, gone = k - 1;
  for (int base = 0; base < k; base += 32) {
    const int e = base + lane;
    const uint64_t held = e < k ? list[e] : 0;
    place += __popc(__ballot_sync(EVERY_LANE, held > key));
    const unsigned twin = __ballot_sync(EVERY_LANE, held != 0 && index_of(held) == index_of(key));
    if (twin) gone = base + __ffs(twin) - 1;
  }
  if (gone < place) return;
  for (int end = gone; end > place;
       end -= 32) {  // 32 places at a time, from the last on, each takes what is before it
    const int e = end - lane;
    const uint64_t before = e > place ? list[e - 1] : 0;
    __syncwarp();
    if (e > place) list[e] = before;
    __syncwarp();
  }
  if (lane == 0) list[place] = key;
  __syncwarp();
}

template <typename T>
using TopKTile = Tile<T, 128, 128, 2, 4>;

// The best of one run of items. Block: 128 queries, items 128 after another. A warp takes a query's scores,
// 32 at a time, and inserts those that beat the last of its list: k log(m / k) of them in random order.
template <typename T>
__global__ void __launch_bounds__(TopKTile<T>::THREADS) top_k_select(TopKArguments<T> a) {
  DYNAMIC_SHARED(memory);
  using Products = TopKTile<T>;
  const int64_t first = int64_t(blockIdx.x) * Products::ROWS;
  const int64_t begin = int64_t(a.m) * blockIdx.y / a.chunks,
                end = int64_t(a.m) * (blockIdx.y + 1) / a.chunks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto list_of = [&](int r) { return a.lists + ((first + r) * a.chunks + blockIdx.y) * a.k; };
  for (int r = warp; r < Products::ROWS && first + r < a.n; r += Products::WARPS)
    for (int e = lane; e < a.k; e += 32) list_of(r)[e] = 0;
  const auto query = [&](int r) { return first + r < a.n ? first + r : int64_t(-1); };
  for (int64_t tile = begin; tile < end; tile += Products::COLUMNS) {
    const auto item = [&](int c) { return tile + c < end ? tile + c : int64_t(-1); };
    const float* products = Products::product(a.query, query, a.items, item, a.width, memory);
    for (int r = warp; r < Products::ROWS && first + r < a.n; r += Products::WARPS) {
      uint64_t* list = list_of(r);
      for (int c = lane; c < Products::COLUMNS; c += 32) {
        const bool there = tile + c < end;
        const int64_t index = there ? (a.group ? a.group[tile + c] : tile + c) : 0;
        const uint64_t key = there ? key_of(products[r * Products::OUT_PITCH + c], uint32_t(index)) : 0;
        unsigned waiting = __ballot_sync(EVERY_LANE, key > list[a.k - 1]);
        for (; waiting; waiting &= waiting - 1) {
          const uint64_t candidate = __shfl_sync(EVERY_LANE, key, __ffs(waiting) - 1);
          if (candidate > list[a.k - 1]) insert(list, a.k, candidate);
        }
      }
    }
  }
}

// The best of all runs of items, decoded; one warp for each query.
template <typename T>
__global__ void top_k_merge(TopKArguments<T> a) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= a.n) return;
  uint64_t* list = a.lists + row * a.chunks * a.k;
  for (int chunk = 1; chunk < a.chunks; ++chunk) {
    const uint64_t* other = list + int64_t(chunk) * a.k;
    for (int e = 0; e < a.k && other[e] > list[a.k - 1]; ++e) insert(list, a.k, other[e]);
  }
  for (int e = lane; e < a.k; e += 32) {
    a.values[row * a.k + e] = score_of(list[e]);
    a.indices[row * a.k + e] = index_of(list[e]);
  }
}

template <typename T>
void top_k(TopKArguments<T> a, cudaStream_t stream) {
  const dim3 grid(ceil_div(a.n, TopKTile<T>::ROWS), a.chunks);
  launch(top_k_select<T>, grid, TopKTile<T>::THREADS, TopKTile<T>::BYTES, stream, a);
  constexpr int THREADS = 128;
  launch(top_k_merge<T>, dim3(ceil_div(a.n, THREADS / 32)), THREADS, 0, stream, a);
}

template void top_k(TopKArguments<float>, cudaStream_t);
template void top_k(TopKArguments<__nv_bfloat16>, cudaStream_t);

}  // namespace discovla

#ifdef REGISTER_OPS
#include "library.cuh"

namespace discovla {
namespace {

// Scores n k, float32, and indices n k, int64, best first.
std::tuple<Tensor, Tensor> top_k_cuda(Tensor query, Tensor items, int64_t k, std::optional<Tensor> groups) {
  expect_rows(query, items);
  if (groups) expect("groups", *groups, {items.size(0)}, ScalarType::Long, query);
  STD_TORCH_CHECK(k >= 1 && k <= items.size(0), "k: expected 1..", items.size(0), ", found ", k);
  const Guard guard(query.get_device_index());
  const int64_t n = query.size(0);
  Tensor values = torch::stable::new_empty(query, {n, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(query, {n, k}, ScalarType::Long);
  const int chunks = chunks_for(int(n), int(items.size(0)), TopKTile<float>::ROWS);
  Tensor lists = torch::stable::new_empty(query, {n, chunks, k}, ScalarType::Long);
  for_rows(query, [&](auto element) {
    using T = decltype(element);
    TopKArguments<T> a{};
    a.query = pointer<T>(query), a.items = pointer<T>(items), a.group = pointer<int64_t>(groups);
    a.n = int(n), a.m = int(items.size(0)), a.width = int(query.size(1)), a.k = int(k), a.chunks = chunks;
    a.lists = reinterpret_cast<uint64_t*>(pointer<int64_t>(lists));
    a.values = pointer<float>(values), a.indices = pointer<int64_t>(indices);
    top_k(a, current_stream(query));
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(discovla, library) {
  library.def("top_k(Tensor query, Tensor items, int k, Tensor? groups) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(discovla, CUDA, library) {
  library.impl("top_k", TORCH_BOX(&top_k_cuda));
}

}  // namespace discovla
#endif
