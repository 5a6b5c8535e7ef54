// Arguments of calls from Python: a few looks at a tensor from Python take longer than a whole call here.
//
// Declared, not included: all of it is part of CPython's stable ABI or of DLPack 1, so a library fits every release of
// them, and a build needs no headers but its own.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "state.hpp"

extern "C" {
struct PyObject;
struct PyThreadState;
extern PyObject _Py_NoneStruct;
const char* PyBytes_AsString(PyObject*);
void PyErr_Clear();
PyObject* PyErr_Occurred();
PyThreadState* PyEval_SaveThread();
void PyEval_RestoreThread(PyThreadState*);
double PyFloat_AsDouble(PyObject*);
long long PyLong_AsLongLong(PyObject*);
void* PyLong_AsVoidPtr(PyObject*);
PyObject* PyLong_FromLongLong(long long);
}

namespace decoquant {

// DLTensor of dlpack.h.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;  // strides in elements
  uint64_t byte_offset;
};

// `dltensor_from_py_object_no_sync` of dlpack.h: 0, or -1 with an exception set. What it gives is the tensor's own.
using ViewTensor = int (*)(PyObject*, DlTensor*);

// Types of elements as DLPack has them: kind, bits, lanes.
constexpr uint32_t dl_type(uint32_t code, uint32_t bits) { return code | bits << 8 | 1 << 16; }
enum class DlType : uint32_t {
  INT64 = dl_type(0, 64),
  UINT8 = dl_type(1, 8),
  FLOAT16 = dl_type(2, 16),
  FLOAT32 = dl_type(2, 32),
  BFLOAT16 = dl_type(4, 16),
  BOOL = dl_type(6, 8),
};

constexpr int64_t REFUSED = -1;  // result of a call with arguments that the kernels do not take as they are

// Sizes of a tensor of four dimensions; zeros for None.
struct Sizes {
  bool given = false;
  int64_t size[4] = {};

  int64_t operator[](int i) const { return size[i]; }
  bool are(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return size[0] == a && size[1] == b && size[2] == c && size[3] == d;
  }
};

// Lets other threads of Python run.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// Reads the arguments of a call one after the other, as long as each is as expected. Its exceptions are Python's.
class Arguments {
 public:
  // view: the address of a `ViewTensor`, an integer.
  Arguments(PyObject* view, PyObject* const* arguments)
      : view_(reinterpret_cast<ViewTensor>(PyLong_AsVoidPtr(view))), next_(arguments) {}

  bool good() const { return good_; }
  void expect(bool condition) { good_ = good_ && condition; }

  int64_t integer() {
    PyObject* object = *next_++;
    if (!good_) return 0;
    const int64_t number = PyLong_AsLongLong(object);
    if (number == -1 && PyErr_Occurred()) good_ = false;
    return number;
  }

  double number(double otherwise) {
    if (skip_none() || !good_) return otherwise;
    const double number = PyFloat_AsDouble(*next_++);
    if (number == -1 && PyErr_Occurred()) good_ = false;
    return number;
  }

  void* address() { return reinterpret_cast<void*>(integer()); }

  // Bytes that hold a `Layout`.
  const Layout& layout() { return *reinterpret_cast<const Layout*>(PyBytes_AsString(*next_++)); }

  void* state(const Layout& layout) { return contiguous(DlType::UINT8, {layout.bytes}); }

  int64_t* integers(std::initializer_list<int64_t> sizes) {
    return static_cast<int64_t*>(contiguous(DlType::INT64, sizes));
  }

  const int64_t* positions(int64_t count) { return integers({count}); }

  void* out(int64_t dtype, std::initializer_list<int64_t> sizes) {
    return contiguous(dtype == FLOAT32 ? DlType::FLOAT32 : dtype == BFLOAT16 ? DlType::BFLOAT16 : DlType::FLOAT16, sizes);
  }

  const uint8_t* optional_flags(int64_t rows, int64_t count) {
    return skip_none() ? nullptr : static_cast<uint8_t*>(contiguous(DlType::BOOL, {rows, count}));
  }

  const float* optional_floats(std::initializer_list<int64_t> sizes) {
    return skip_none() ? nullptr : static_cast<float*>(contiguous(DlType::FLOAT32, sizes));
  }

  // Floats in four dimensions, the last one contiguous.
  Array rows(Sizes& sizes) {
    const Array array = strided(sizes);
    expect(array.dtype != BOOL && (array.stride[3] == 1 || sizes[0] * sizes[1] * sizes[2] * sizes[3] == 0));
    return array;
  }

  Array optional_rows(Sizes& sizes) { return skip_none() ? Array{} : rows(sizes); }

  // Floats or truth values in four dimensions; strides of the first three are 0 where they broadcast.
  Array optional_mask(Sizes& sizes) {
    if (skip_none()) return {};
    Array array = strided(sizes);
    for (int i = 0; i < 3; ++i) {
      if (sizes[i] < 2) array.stride[i] = 0;
    }
    return array;
  }

 private:
  static constexpr int32_t CPU = 1;

  static DlType type_of(const DlTensor& tensor) {
    return DlType{tensor.code | uint32_t{tensor.bits} << 8 | uint32_t{tensor.lanes} << 16};
  }
  static void* data_of(const DlTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

  bool skip_none() {
    if (*next_ != &_Py_NoneStruct) return false;
    ++next_;
    return true;
  }

  // Whether the next argument is a tensor in the memory of the CPU.
  bool read(DlTensor& tensor) {
    PyObject* object = *next_++;
    expect(object != &_Py_NoneStruct);
    if (!good_) return false;
    if (view_(object, &tensor) != 0) {
      PyErr_Clear();  // a kind of tensor that DLPack does not know
      return good_ = false;
    }
    return good_ = tensor.device_type == CPU;
  }

  void* contiguous(DlType type, std::initializer_list<int64_t> sizes) {
    DlTensor tensor;
    if (!read(tensor)) return nullptr;
    expect(type_of(tensor) == type && tensor.dimensions == static_cast<int32_t>(sizes.size()));
    if (!good_) return nullptr;
    int64_t stride = 1;
    for (int32_t i = tensor.dimensions; i-- > 0; stride *= tensor.shape[i]) {
      expect(tensor.shape[i] == sizes.begin()[i] && (tensor.shape[i] < 2 || stride == 0 || tensor.strides[i] == stride));
    }
    return data_of(tensor);
  }

  Array strided(Sizes& sizes) {
    DlTensor tensor;
    Array array = {};
    if (!read(tensor)) return array;
    switch (type_of(tensor)) {
      case DlType::FLOAT32: array.dtype = FLOAT32; break;
      case DlType::BFLOAT16: array.dtype = BFLOAT16; break;
      case DlType::FLOAT16: array.dtype = FLOAT16; break;
      case DlType::BOOL: array.dtype = BOOL; break;
      default: good_ = false;
    }
    expect(tensor.dimensions == 4);
    if (!good_) return array;
    array.data = data_of(tensor);
    sizes.given = true;
    for (int i = 0; i < 4; ++i) {
      sizes.size[i] = tensor.shape[i];
      array.stride[i] = tensor.strides[i];
    }
    return array;
  }

  ViewTensor view_;
  PyObject* const* next_;
  bool good_ = true;
};

// Answers a call from Python (METH_FASTCALL): reads its arguments into a `Call`, and lets other threads of Python run
// while it works. Returns what `work` does, `REFUSED`, or null with an exception set.
template <class Call, class Result>
PyObject* answer(PyObject* view, PyObject* const* arguments, bool (*read)(Arguments&, Call&),
                 Result (*work)(const Call&)) {
  Arguments from(view, arguments);
  Call call;
  int64_t result = REFUSED;
  if (read(from, call)) {
    const Unlocked unlocked;
    result = work(call);
  }
  return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(result);
}

}  // namespace decoquant
