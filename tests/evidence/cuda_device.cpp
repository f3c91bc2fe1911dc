// A CUDA device made of this process, linked with the objects of csrc/cuda in the place of libcudart and libtorch_cuda:
// CPU tensors count as tensors of device kDevice, implementations for CUDA are registered for the unused dispatch key
// VE, and a launch calls back into Python, which executes it.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define REAL(name) reinterpret_cast<decltype(&name)>(dlsym(RTLD_NEXT, #name))

struct dim3 {
  unsigned x, y, z;
};

struct Buffer {
  const void* data;
  int64_t bytes;
};

// Returns 0, or the CUDA error that the launch reports.
using OnLaunch = int (*)(const char* kernel, const dim3* grid, const dim3* block, uint64_t shared,
                         void* const* arguments, const Buffer* buffers, uint64_t buffer_count);

namespace {

constexpr int32_t kDevice = 3;
void* const kStream = reinterpret_cast<void*>(0x57e0);

OnLaunch on_launch = nullptr;
std::vector<Buffer> buffers;
int32_t current_device = 0;
int error = 0;
std::string error_text;

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}
std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

int fail(int code, const char* text) {
  if (!error) error_text = text;
  return error = error ? error : code;
}

void remember(AtenTensorHandle tensor, const void* data) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr, elements = 1;
  int32_t dtype = 0;
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  for (int64_t i = 0; i < dim; ++i) elements += (sizes[i] - 1) * strides[i];
  for (int64_t i = 0; i < dim; ++i) elements = sizes[i] ? elements : 0;
  buffers.push_back({data, elements * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype))});
}

}  // namespace

// For the test.
EXPORT void device_reset(OnLaunch callback) {
  on_launch = callback;
  buffers.clear();
  error = 0;
}
EXPORT void device_fail(int code, const char* text) { fail(code, text); }

extern "C" {

// libtorch
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle* library) {
  return REAL(aoti_torch_library_init_impl)(ns, strcmp(key, "CUDA") ? key : "VE", file, line, library);
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  const AOTITorchError status = REAL(aoti_torch_get_device_type)(tensor, type);
  if (*type == aoti_torch_device_type_cpu()) *type = aoti_torch_device_type_cuda();
  return status;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = kDevice;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError status = REAL(aoti_torch_get_data_ptr)(tensor, data);
  remember(tensor, *data);
  return status;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError status = REAL(torch_get_mutable_data_ptr)(tensor, data);
  remember(tensor, *data);
  return status;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError status = REAL(torch_get_const_data_ptr)(tensor, data);
  remember(tensor, *data);
  return status;
}
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int32_t(current_device));
  current_device = index;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  int32_t* before = reinterpret_cast<int32_t*>(guard);
  current_device = *before;
  delete before;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  *stream = index == kDevice ? kStream : nullptr;
  return AOTI_TORCH_SUCCESS;
}

// libcudart
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  constexpr int kMaxDynamicSharedMemorySize = 8;
  if (attribute == kMaxDynamicSharedMemorySize) shared_limits()[host] = value;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  const size_t limit = shared_limits().count(kernel) ? shared_limits()[kernel] : 48 << 10;
  if (current_device != kDevice) return fail(101, "launched under the wrong device");
  if (stream != kStream) return fail(400, "launched on another stream than the current one");
  if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    return fail(9, "the grid is out of bounds");
  if (!block.x || !block.y || !block.z || block.z > 64 || uint64_t{block.x} * block.y * block.z > 1024)
    return fail(9, "the block is out of bounds");
  if (shared > limit) return fail(1, "more shared memory than the kernel's attribute allows");
  if (error) return error;
  const int status =
      on_launch(kernels()[kernel].c_str(), &grid, &block, shared, arguments, buffers.data(), buffers.size());
  return status ? fail(status, "the kernel failed") : 0;
}
int cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  return __cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
int cudaGetLastError() {
  const int last = error;
  error = 0;
  return last;
}
const char* cudaGetErrorString(int) { return error_text.c_str(); }

}  // extern "C"
