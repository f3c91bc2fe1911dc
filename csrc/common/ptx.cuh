// What CUDA C++ has no word for (sm_80 and newer): asynchronous copies, matrix loads, products of tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace scrimp::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// (word & mask) ^ bits in one instruction, which the compiler makes two of where both are constants.
__device__ __forceinline__ uint32_t and_xor(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// Starts to copy 16 bytes from global to shared memory, both aligned to 16; zeros where not `inside`, where `from` is
// not read. They are there behind a wait of the thread that copies, for others behind a barrier after it.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

// Ends a group of the thread's copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the newest kGroups groups of the thread's copies are in flight.
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Two numbers to shared memory at once, aligned to 8 bytes; nvcc may store the halves of a float2 one by one.
__device__ __forceinline__ void store_two(float* to, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(shared_address(to)), "f"(first), "f"(second) : "memory");
}

// Four 8x8 matrices of 16-bit numbers: lane 8 m + r points to row r of matrix m (16 bytes, aligned). Register m then
// holds numbers 2 (lane % 4) and the next of row lane / 4 of matrix m, or of its transpose.
template <bool kTransposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8] in T with fp32 sums. Lane 4 g + q holds, two numbers a register,
//   a: rows g, g + 8, g, g + 8 at columns 2 q (registers 0, 1) and 2 q + 8 (2, 3), and the column behind each;
//   b: column g at rows 2 q (register 0) and 2 q + 8 (1), and the row behind each;
//   c: row g (numbers 0, 1) and g + 8 (2, 3) at columns 2 q, 2 q + 1.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c [16, 8] += a [16, 32] b [32, 8] in integers, a of bytes without a sign, b of bytes with one. Lane 4 g + q holds,
// four numbers a register,
//   a: rows g, g + 8, g, g + 8 at columns 4 q (registers 0, 1) and 4 q + 16 (2, 3);
//   b: column g at rows 4 q (register 0) and 4 q + 16 (1);
//   c: row g (numbers 0, 1) and g + 8 (2, 3) at columns 2 q, 2 q + 1.
__device__ __forceinline__ void multiply_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to T in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// 2^x by the hardware's approximation, relative error up to 2^-22; denormal results are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace scrimp::ptx
