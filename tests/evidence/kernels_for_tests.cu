// Small CUDA kernels that the tests of the PTX emulator compile with nvcc and execute.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace ptx = scrimp::ptx;

// Sum of n floats: grid-stride loop, shuffles, shared memory, one atomic a block.
extern "C" __global__ void reduce_sum(const float* x, float* out, int n) {
  __shared__ float part[32];
  float sum = 0.f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) sum += x[i];
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.f;
  for (int o = 16; o; o >>= 1) sum += __shfl_down_sync(~0u, sum, o);
  if (threadIdx.x == 0) atomicAdd(out, sum);
}

// C = A B with 64x64x32 tiles, four warps, two stages, swizzled rows; any sizes with K, N % 8 == 0.
template <class T>
__global__ void __launch_bounds__(128) gemm(const T* a, const T* b, float* c, int m, int n, int k) {
  constexpr int kRows = 64, kCols = 64, kDepth = 32, kStage = (kRows + kCols) * kDepth;
  extern __shared__ __align__(16) unsigned char raw[];
  T* tiles = reinterpret_cast<T*>(raw);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row0 = blockIdx.y * kRows, col0 = blockIdx.x * kCols;
  const int wr = (warp >> 1) * 32, wc = (warp & 1) * 32;
  auto at_a = [&](int s, int r, int c8) { return tiles + s * kStage + r * kDepth + ((c8 ^ (r >> 1 & 3)) << 3); };
  auto at_b = [&](int s, int r, int c8) {
    return tiles + s * kStage + kRows * kDepth + r * kCols + ((c8 ^ (r & 7)) << 3);
  };
  auto fetch = [&](int s, int k0) {
    for (int i = threadIdx.x; i < kRows * kDepth / 8; i += 128) {
      const int r = i >> 2, c8 = i & 3;
      const bool inside = row0 + r < m && k0 + c8 * 8 < k;
      ptx::copy_async(at_a(s, r, c8), inside ? a + static_cast<size_t>(row0 + r) * k + k0 + c8 * 8 : a, inside);
    }
    for (int i = threadIdx.x; i < kDepth * kCols / 8; i += 128) {
      const int r = i >> 3, c8 = i & 7;
      const bool inside = k0 + r < k && col0 + c8 * 8 < n;
      ptx::copy_async(at_b(s, r, c8), inside ? b + static_cast<size_t>(k0 + r) * n + col0 + c8 * 8 : b, inside);
    }
    ptx::commit_copies();
  };
  float acc[2][4][4] = {};
  const int steps = (k + kDepth - 1) / kDepth;
  fetch(0, 0);
  for (int t = 0; t < steps; ++t) {
    if (t + 1 < steps) {
      fetch((t + 1) & 1, (t + 1) * kDepth);
      ptx::wait_copies<1>();
    } else {
      ptx::wait_copies<0>();
    }
    __syncthreads();
    for (int kk = 0; kk < kDepth / 16; ++kk) {
      uint32_t fa[2][4], fb[2][4];
      for (int i = 0; i < 2; ++i)
        ptx::load_matrices(fa[i], at_a(t & 1, wr + i * 16 + (lane & 15), kk * 2 + (lane >> 4)));
      for (int j = 0; j < 2; ++j)
        ptx::load_matrices<true>(fb[j], at_b(t & 1, kk * 16 + (lane & 15), wc / 8 + j * 2 + (lane >> 4)));
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
          ptx::multiply<T>(acc[i][j], fa[i], fb[j >> 1][(j & 1) * 2], fb[j >> 1][(j & 1) * 2 + 1]);
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int h = 0; h < 4; ++h) {
        const int r = row0 + wr + i * 16 + (lane >> 2) + (h >> 1) * 8,
                  col = col0 + wc + j * 8 + (lane & 3) * 2 + (h & 1);
        if (r < m && col < n) c[static_cast<size_t>(r) * n + col] = acc[i][j][h];
      }
}
template __global__ void gemm<__half>(const __half*, const __half*, float*, int, int, int);
template __global__ void gemm<__nv_bfloat16>(const __nv_bfloat16*, const __nv_bfloat16*, float*, int, int, int);

// Packed half arithmetic, as a dequantising kernel does it: y = (x0 * s + b, x1 * s + b), clamped.
extern "C" __global__ void half_affine(const __half2* x, __half2* y, __half s, __half b, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const __half2 v = __hfma2(x[i], __half2half2(s), __half2half2(b));
  y[i] = __hmax2(__hmin2(v, __float2half2_rn(2.f)), __float2half2_rn(-2.f));
}
extern "C" __global__ void bfloat_affine(const __nv_bfloat162* x, __nv_bfloat162* y, __nv_bfloat16 s, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = __hmul2(__hadd2(x[i], x[i]), __bfloat162bfloat162(s));
}

// Integer and control-flow material: a switch, a local array indexed at run time, bit tricks, 64-bit division.
extern "C" __global__ void scramble(const uint32_t* x, uint64_t* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint32_t table[8];
  for (int k = 0; k < 8; ++k) table[(x[i] + k) & 7] = x[(i + k) % n] * 2654435761u;
  uint32_t v = table[x[i] >> 29];
  switch (x[i] % 7) {
    case 0:
      v = __brev(v);
      break;
    case 1:
      v = __popc(v) * 1000003u;
      break;
    case 2:
      v = __byte_perm(v, x[i], 0x5140);
      break;
    case 3:
      v = __clz(v) + __ffs(v);
      break;
    case 4:
      v = __funnelshift_l(v, x[i], 11);
      break;
    case 5:
      v = __umulhi(v, x[i]);
      break;
    default:
      v = ~v;
  }
  uint64_t wide = (static_cast<uint64_t>(v) << 20) * (x[i] | 1) + 12345;
  for (uint32_t k = 0; k < (x[i] & 15); ++k) wide = wide * 6364136223846793005ull + k;
  y[i] = wide / (v | 1) ^ wide % (x[i] | 1);
}

// Warp-aggregated compaction: ballot, popc, shuffle of the base, ordered inside a warp.
extern "C" __global__ void compact_positive(const float* x, int* indices, int* count, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31;
  const bool keep = i < n && x[i] > 0.f;
  const unsigned votes = __ballot_sync(~0u, keep);
  int base = 0;
  if (lane == 0 && votes) base = atomicAdd(count, __popc(votes));
  base = __shfl_sync(~0u, base, 0);
  if (keep) indices[base + __popc(votes & ((1u << lane) - 1))] = i;
}

extern "C" __global__ void double_norm(const double* x, double* out, int n) {
  __shared__ double part[8];
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum = fma(x[i], x[i], sum);
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < blockDim.x / 32; ++w) sum += part[w];
    out[0] = sqrt(sum);
  }
}

extern "C" __global__ void math(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    y[i] = expf(x[i]) + logf(1.f + x[i] * x[i]) + sinf(x[i]) * rsqrtf(1.f + fabsf(x[i])) + tanhf(x[i]) + x[i] / 3.f;
}
