// A pretended GPU for a CPU build of torch: the C++ that a real one would have linked in.
//
// Its "device memory" is host memory that only says that it is a GPU's. The environment variable
// PRETENDED_DEVICES ("cuda:2", "mps:1", "xpu:1") names the kind and how many there are. Kernels
// are not here: device.py runs each operation on the CPU, through on_host() and on_device().
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/detail/XPUHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <string>

using namespace c10;

namespace {

constexpr int MOST_DEVICES = 8;
constexpr int64_t NO_LIMIT = std::numeric_limits<int64_t>::max();

const std::string machine = std::getenv("PRETENDED_DEVICES");
const std::string kind_name = machine.substr(0, machine.find(':'));
const DeviceIndex n_devices = std::stoi(machine.substr(machine.find(':') + 1));
const DeviceType kind = kind_name == "cuda" ? DeviceType::CUDA
                        : kind_name == "mps" ? DeviceType::MPS
                                             : DeviceType::XPU;
const DispatchKey key = kind == DeviceType::CUDA  ? DispatchKey::CUDA
                        : kind == DeviceType::MPS ? DispatchKey::MPS
                                                  : DispatchKey::XPU;

thread_local DeviceIndex current = 0;
std::array<std::atomic<int64_t>, MOST_DEVICES> allocated{}, peaks{}, limits{};

Device with_index(Device device) {
  return Device(kind, device.has_index() ? device.index() : current);
}

// ---------------------------------------------------------------------------------- memory

struct Block {  // what a DataPtr of a device owns: memory of its own, or a host storage that it shows
  DataPtr memory;
  Storage host;
  DeviceIndex index;
  int64_t size;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated[block->index] -= block->size;
  delete block;
}

void take(DeviceIndex index, int64_t size) {
  TORCH_CHECK_WITH(
      OutOfMemoryError,
      allocated[index] + size <= limits[index],
      kind_name, " out of memory. Tried to allocate ", size, " bytes.");
  allocated[index] += size;
  peaks[index] = std::max<int64_t>(peaks[index], allocated[index]);
}

struct DeviceAllocator final : Allocator {
  DataPtr allocate(size_t size) override {
    const auto index = current;
    take(index, size);
    auto* block = new Block{GetCPUAllocator()->allocate(size), Storage(), index, (int64_t)size};
    return {block->memory.get(), block, &release, Device(kind, index)};
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
} device_allocator;

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;  // start -> size

struct PinnedBlock {
  DataPtr memory;
};

struct PinnedAllocator final : Allocator {
  DataPtr allocate(size_t size) override {
    auto* block = new PinnedBlock{GetCPUAllocator()->allocate(size)};
    std::lock_guard<std::mutex> lock(pinned_lock);
    pinned[static_cast<const char*>(block->memory.get())] = size;
    return {block->memory.get(), block, &unpin, Device(DeviceType::CPU)};
  }
  static void unpin(void* context) {
    auto* block = static_cast<PinnedBlock*>(context);
    std::lock_guard<std::mutex> lock(pinned_lock);
    pinned.erase(static_cast<const char*>(block->memory.get()));
    delete block;
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
} pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_lock);
  auto above = pinned.upper_bound(static_cast<const char*>(data));
  if (above == pinned.begin()) return false;
  const auto& [start, size] = *std::prev(above);
  return static_cast<const char*>(data) < start + size;
}

// ------------------------------------------------------------------------------ generators

struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(DeviceIndex index) : CPUGeneratorImpl(default_rng_seed_val) {
    device_ = Device(kind, index);
    key_set_ = DispatchKeySet(key);
  }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(device_.index());
    copy->set_engine(const_cast<DeviceGenerator*>(this)->engine());
    return copy;
  }
};

at::Generator new_generator(DeviceIndex index) {
  return at::make_generator<DeviceGenerator>(index < 0 ? current : index);
}

const at::Generator& default_generator(DeviceIndex index) {
  static std::array<at::Generator, MOST_DEVICES> generators = [] {
    std::array<at::Generator, MOST_DEVICES> made;
    for (int i = 0; i < MOST_DEVICES; i++) made[i] = new_generator(i);
    return made;
  }();
  return generators[index < 0 ? current : index];
}

// ------------------------------------------------------------------------- guard and hooks

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kind; }
  Device getDevice() const override { return Device(kind, current); }
  void setDevice(Device device) const override { current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  Device exchangeDevice(Device device) const override {
    Device before(kind, current);
    current = device.index();
    return before;
  }
  Stream getStream(Device device) const noexcept override {
    return Stream(Stream::DEFAULT, with_index(device));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int = 0) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return n_devices; }
  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

// what the three kinds of hooks have in common
#define HOOKS                                                                                  \
  void init() const override {}                                                                \
  bool isBuilt() const override { return true; }                                               \
  bool isAvailable() const override { return true; }                                           \
  bool hasPrimaryContext(DeviceIndex) const override { return true; }                          \
  DeviceIndex deviceCount() const override { return n_devices; }                               \
  DeviceIndex getCurrentDevice() const override { return current; }                            \
  void setCurrentDevice(DeviceIndex index) const override { current = index; }                 \
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }                \
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }       \
  at::Generator getNewGenerator(DeviceIndex index) const override {                            \
    return new_generator(index);                                                               \
  }                                                                                            \
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {                 \
    return default_generator(index);                                                           \
  }                                                                                            \
  Device getDeviceFromPtr(void*) const override { return Device(kind, current); }

struct CUDAHooks final : at::CUDAHooksInterface {
  HOOKS
  bool hasCUDA() const override { return true; }
  DeviceIndex current_device() const override { return current; }
  int getNumGPUs() const override { return n_devices; }
};

struct MPSHooks final : at::MPSHooksInterface {
  HOOKS
  bool hasMPS() const override { return true; }
  void deviceSynchronize() const override {}
  void emptyCache() const override {}
  size_t getCurrentAllocatedMemory() const override { return allocated[0]; }
};

struct XPUHooks final : at::XPUHooksInterface {
  HOOKS
  bool hasXPU() const override { return true; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getNumGPUs() const override { return n_devices; }
};

bool register_all() {
  for (auto& limit : limits) limit = NO_LIMIT;
  static Guard guard;
  impl::DeviceGuardImplRegistrar(kind, &guard);
  SetAllocator(kind, &device_allocator);
  if (kind == DeviceType::CUDA)
    at::CUDAHooksRegistry()->Register(
        "CUDAHooks", [](at::CUDAHooksArgs) -> std::unique_ptr<at::CUDAHooksInterface> {
          return std::make_unique<CUDAHooks>();
        });
  if (kind == DeviceType::MPS)
    at::MPSHooksRegistry()->Register(
        "MPSHooks", []() -> std::unique_ptr<at::MPSHooksInterface> {
          return std::make_unique<MPSHooks>();
        });
  if (kind == DeviceType::XPU)
    at::XPUHooksRegistry()->Register(
        "XPUHooks", []() -> std::unique_ptr<at::XPUHooksInterface> {
          return std::make_unique<XPUHooks>();
        });
  return true;
}
const bool registered = register_all();

// ------------------------------------------------------------------------------ operations

void require_known_to_metal(ScalarType dtype) {
  TORCH_CHECK_TYPE(
      kind != DeviceType::MPS || dtype != kDouble, "an fp64 tensor on MPS, which has none");
}

at::Tensor empty(
    IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
    std::optional<Device> device, std::optional<bool>, std::optional<MemoryFormat> format) {
  const auto type = dtype_or_default(dtype);
  require_known_to_metal(type);
  DeviceGuard guard(with_index(*device));
  return at::detail::empty_generic(size, &device_allocator, DispatchKeySet(key), type, format);
}

at::Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
    std::optional<Device> device, std::optional<bool>) {
  const auto type = dtype_or_default(dtype);
  require_known_to_metal(type);
  DeviceGuard guard(with_index(*device));
  return at::detail::empty_strided_generic(
      size, stride, &device_allocator, DispatchKeySet(key), type);
}

at::Tensor over(Storage storage, DispatchKey where, const at::Tensor& like) {
  auto made = at::detail::make_tensor<TensorImpl>(
      std::move(storage), DispatchKeySet(where), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// a CPU tensor over the memory of a device's, which it keeps alive
at::Tensor on_host(const at::Tensor& x) {
  auto* kept = new Storage(x.storage());
  DataPtr data(
      kept->mutable_data(), kept, [](void* context) { delete static_cast<Storage*>(context); },
      Device(DeviceType::CPU));
  Storage storage(
      Storage::use_byte_size_t(), kept->nbytes(), std::move(data), GetCPUAllocator(), false);
  return over(std::move(storage), DispatchKey::CPU, x);
}

// a device's tensor over the memory of a CPU tensor
at::Tensor on_device(const at::Tensor& x, int64_t index) {
  require_known_to_metal(x.scalar_type());
  const int64_t size = x.storage().nbytes();
  take(index, size);
  auto* block = new Block{DataPtr(), x.storage(), (DeviceIndex)index, size};
  DataPtr data(block->host.mutable_data(), block, &release, Device(kind, index));
  Storage storage(
      Storage::use_byte_size_t(), size, std::move(data), &device_allocator, true);
  return over(std::move(storage), key, x);
}

int64_t count_allocated(int64_t index) { return allocated[index]; }
int64_t count_peak(int64_t index) { return peaks[index]; }
void reset_peak(int64_t index) { peaks[index] = allocated[index].load(); }
void set_limit(int64_t index, int64_t size) { limits[index] = size; }

}  // namespace

TORCH_LIBRARY(pretended, m) {
  m.def("on_host(Tensor x) -> Tensor", &on_host);
  m.def("on_device(Tensor x, int index) -> Tensor", &on_device);
  m.def("allocated(int index) -> int", &count_allocated);
  m.def("peak(int index) -> int", &count_peak);
  m.def("reset_peak(int index) -> ()", &reset_peak);
  m.def("set_limit(int index, int size) -> ()", &set_limit);
}

void register_memory(torch::Library& m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &at::native::resize_);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) { register_memory(m); }
TORCH_LIBRARY_IMPL(aten, MPS, m) { register_memory(m); }
TORCH_LIBRARY_IMPL(aten, XPU, m) { register_memory(m); }
