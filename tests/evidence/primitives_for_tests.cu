// Each primitive of common/ptx.cuh alone, one warp a block: what test_ptx_primitives.py executes.
#include "common/ptx.cuh"

namespace ptx = scrimp::ptx;

// Lane i copies vector i of x, zeros from `count` on; two groups, the second of which is y.
extern "C" __global__ void copies(const uint4* x, const uint4* y, uint4* out, int count, int both) {
  __shared__ uint4 tiles[2][32];
  const int lane = threadIdx.x;
  ptx::copy_async(&tiles[0][lane], x + lane, lane < count);
  ptx::commit_copies();
  ptx::copy_async(&tiles[1][lane], y + lane);
  ptx::commit_copies();
  ptx::wait_copies<1>();
  out[lane] = tiles[0][lane];
  if (both) ptx::wait_copies<0>();
  out[32 + lane] = tiles[1][lane];
}

// The four registers of each lane, lane by lane; lane i points to row rows[i] of x [32, 8].
template <bool kTransposed>
__global__ void matrices(const uint4* x, const int* rows, uint4* out) {
  __shared__ uint4 tile[32];
  const int lane = threadIdx.x;
  tile[lane] = x[lane];
  __syncthreads();
  uint32_t found[4];
  ptx::load_matrices<kTransposed>(found, &tile[rows[lane]]);
  out[lane] = {found[0], found[1], found[2], found[3]};
}
template __global__ void matrices<false>(const uint4*, const int*, uint4*);
template __global__ void matrices<true>(const uint4*, const int*, uint4*);

// c [16, 8] += a [16, 16] b [16, 8], all row by row; fragments are gathered number by number as the header says.
template <class T>
__global__ void products(const uint16_t* a, const uint16_t* b, float* c) {
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  for (int r = 0; r < 4; ++r) {
    const uint16_t* at = a + (g + r % 2 * 8) * 16 + 2 * q + r / 2 * 8;
    fa[r] = at[0] | static_cast<uint32_t>(at[1]) << 16;
  }
  for (int r = 0; r < 2; ++r) {
    const uint16_t* at = b + (2 * q + 8 * r) * 8 + g;
    fb[r] = at[0] | static_cast<uint32_t>(at[8]) << 16;
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  ptx::multiply<T>(sums, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sums[i];
}
template __global__ void products<__half>(const uint16_t*, const uint16_t*, float*);
template __global__ void products<__nv_bfloat16>(const uint16_t*, const uint16_t*, float*);

// c [16, 8] += a [16, 32] b [32, 8] of bytes, all row by row.
extern "C" __global__ void byte_products(const uint8_t* a, const uint8_t* b, int* c) {
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  uint32_t fa[4] = {}, fb[2] = {};
  for (int i = 0; i < 16; ++i) {
    const int r = i / 4, byte = i % 4;
    fa[r] |= static_cast<uint32_t>(a[(g + r % 2 * 8) * 32 + 4 * q + r / 2 * 16 + byte]) << 8 * byte;
    if (r < 2) fb[r] |= static_cast<uint32_t>(b[(4 * q + 16 * r + byte) * 8 + g]) << 8 * byte;
  }
  int sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  ptx::multiply_bytes(sums, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sums[i];
}

// Words of one lane each, masked, some bits inverted.
extern "C" __global__ void masks(const uint32_t* words, uint32_t* out, uint32_t mask, uint32_t bits) {
  out[threadIdx.x] = ptx::and_xor(words[threadIdx.x], mask, bits);
}

template <class T>
__global__ void numbers(const float* x, uint32_t* packed, float* powers, float* pairs) {
  __shared__ alignas(8) float kept[64];
  ptx::store_two(&kept[2 * threadIdx.x], x[2 * threadIdx.x + 1], x[2 * threadIdx.x]);
  pairs[2 * threadIdx.x] = kept[2 * threadIdx.x];
  pairs[2 * threadIdx.x + 1] = kept[2 * threadIdx.x + 1];
  packed[threadIdx.x] = ptx::pack<T>(x[2 * threadIdx.x], x[2 * threadIdx.x + 1]);
  powers[threadIdx.x] = ptx::exp2_approximate(x[threadIdx.x]);
}
template __global__ void numbers<__half>(const float*, uint32_t*, float*, float*);
template __global__ void numbers<__nv_bfloat16>(const float*, uint32_t*, float*, float*);
