// Products of a tile of rows of x with a tile of rows of y, by one thread block, into shared memory.
#pragma once

#include "device.cuh"

namespace discovla {

namespace wmma = nvcuda::wmma;

// ROWS x COLUMNS products of T (float or __nv_bfloat16), added up in float32.
//
// The block has DOWN x ACROSS warps; each holds (ROWS / DOWN) x (COLUMNS / ACROSS) sums in registers. Rows
// pass through two stages of shared memory, 128 bytes of each at a time, the next copied while one is
// multiplied. Float32 is multiplied as three TF32 products. An element is summed in the same order at every
// place of a tile, so equal rows give equal products.
template <typename T, int ROWS_, int COLUMNS_, int DOWN, int ACROSS>
struct Tile {
  using Element = T;
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
  static constexpr int WARPS = DOWN * ACROSS, THREADS = 32 * WARPS;
  static constexpr int VECTOR = 16 / sizeof(T);  // elements of one copy
  static constexpr int DEPTH = 128 / sizeof(T);  // elements of a row in one stage
  static constexpr int PITCH = DEPTH + VECTOR;   // 144 bytes: eight rows lie in different banks
  static constexpr int STAGE = (ROWS + COLUMNS) * PITCH;
  static constexpr int OUT_PITCH = COLUMNS + 4;  // of the products
  static constexpr int M = ROWS / DOWN / 16, N = COLUMNS / ACROSS / 16;
  static constexpr size_t STAGED = 2 * STAGE * sizeof(T), PRODUCTS = ROWS * OUT_PITCH * sizeof(float);
  static constexpr size_t BYTES = STAGED > PRODUCTS ? STAGED : PRODUCTS;
  static_assert(M * DOWN * 16 == ROWS && N * ACROSS * 16 == COLUMNS, "warps share the tile evenly");

  using Sums = wmma::fragment<wmma::accumulator, 16, 16, sizeof(T) == 4 ? 8 : 16, float>;

  // x_row, y_row: place in the tile -> row of x or y, or -1 for a row of zeros. width: elements of a row, a
  // multiple of VECTOR; x and y are aligned to 16 bytes. memory: BYTES, aligned to 128. The products are in
  // memory, OUT_PITCH apart, when it returns; all threads of the block call it.
  template <typename XRow, typename YRow>
  static __device__ const float* product(const T* x, XRow x_row, const T* y, YRow y_row, int width,
                                         unsigned char* memory) {
    T* stages = reinterpret_cast<T*>(memory);
    float* out = reinterpret_cast<float*>(memory);
    Sums sums[M][N];
#pragma unroll
    for (auto& row : sums)
#pragma unroll
      for (auto& sum : row) wmma::fill_fragment(sum, 0.0f);
    const int steps = ceil_div(width, DEPTH);
    __syncthreads();  // threads may still read the products of the previous call
    copy(x, x_row, y, y_row, width, 0, stages);
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) {
        copy(x, x_row, y, y_row, width, step + 1, stages + (step + 1) % 2 * STAGE);
      } else {
        __pipeline_commit();  // an empty one, so that the wait below is for the stage before
      }
      __pipeline_wait_prior(1);
      __syncthreads();
      multiply(stages + step % 2 * STAGE, sums);
      __syncthreads();
    }
    const int warp = threadIdx.x / 32, down = warp / ACROSS * M * 16, across = warp % ACROSS * N * 16;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
        wmma::store_matrix_sync(out + (down + 16 * m) * OUT_PITCH + across + 16 * n, sums[m][n], OUT_PITCH,
                                wmma::mem_row_major);
    __syncthreads();
    return out;
  }

 private:
  template <typename XRow, typename YRow>
  static __device__ void copy(const T* x, XRow x_row, const T* y, YRow y_row, int width, int step, T* stage) {
    constexpr int PARTS = DEPTH / VECTOR;
    for (int slot = threadIdx.x; slot < (ROWS + COLUMNS) * PARTS; slot += THREADS) {
      const int place = slot / PARTS, part = slot % PARTS * VECTOR, d = step * DEPTH + part;
      const bool of_x = place < ROWS;
      const int64_t row = of_x ? x_row(place) : y_row(place - ROWS);
      const bool there = row >= 0 && d < width;
      const T* from = (of_x ? x : y) + (there ? row * width + d : 0);
      __pipeline_memcpy_async(stage + place * PITCH + part, from, 16, there ? 0 : 16);
    }
    __pipeline_commit();
  }

  static __device__ void multiply(const T* stage, Sums (&sums)[M][N]) {
    const int warp = threadIdx.x / 32;
    const T* x = stage + warp / ACROSS * M * 16 * PITCH;
    const T* y = stage + (ROWS + warp % ACROSS * N * 16) * PITCH;
    if constexpr (sizeof(T) == 4) {
      multiply_float(x, y, sums);
    } else {
      multiply_bfloat16(x, y, sums);
    }
  }

  static __device__ void multiply_bfloat16(const T* x, const T* y, Sums (&sums)[M][N]) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b[N];
    for (int k = 0; k < DEPTH; k += 16) {
#pragma unroll
      for (int n = 0; n < N; ++n) wmma::load_matrix_sync(b[n], y + 16 * n * PITCH + k, PITCH);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        wmma::load_matrix_sync(a, x + 16 * m * PITCH + k, PITCH);
#pragma unroll
        for (int n = 0; n < N; ++n) wmma::mma_sync(sums[m][n], a, b[n], sums[m][n]);
      }
    }
  }

  // x = high + low, each of TF32's 11 bits; of the four products the one of both lows is below float32's
  // rounding.
  static __device__ void multiply_float(const float* x, const float* y, Sums (&sums)[M][N]) {
    wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major> a_high, a_low;
    wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::col_major> b_high[N], b_low[N];
    for (int k = 0; k < DEPTH; k += 8) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        wmma::load_matrix_sync(b_high[n], y + 16 * n * PITCH + k, PITCH);
        split(b_high[n], b_low[n]);
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        wmma::load_matrix_sync(a_high, x + 16 * m * PITCH + k, PITCH);
        split(a_high, a_low);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          wmma::mma_sync(sums[m][n], a_low, b_high[n], sums[m][n]);
          wmma::mma_sync(sums[m][n], a_high, b_low[n], sums[m][n]);
          wmma::mma_sync(sums[m][n], a_high, b_high[n], sums[m][n]);
        }
      }
    }
  }

  template <typename Fragment>
  static __device__ void split(Fragment& high, Fragment& low) {
#pragma unroll
    for (int e = 0; e < high.num_elements; ++e) {
      const float value = high.x[e];
      high.x[e] = wmma::__float_to_tf32(value);
      low.x[e] = wmma::__float_to_tf32(value - high.x[e]);
    }
  }
};

}  // namespace discovla
