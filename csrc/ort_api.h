// The part of onnxruntime's C API that bindings/onnxruntime.cpp uses, so that the build needs no
// onnxruntime, whose Python package has no headers. The API only ever appends: an index of a
// function is valid in every later version. Names follow onnxruntime_c_api.h, version 17 of the API
// (onnxruntime 1.17), the first with a parallel loop on the threads of a session.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define ORT_CALL __stdcall
#else
#define ORT_CALL
#endif

namespace involution::ort {

constexpr std::uint32_t VERSION = 17;

enum ErrorCode : int { FAIL = 1, INVALID_ARGUMENT = 2 };
enum ElementType : int { FLOAT = 1 };
enum AttributeType : int { INT = 1, INTS = 2 };
enum Characteristic : int { REQUIRED = 0, OPTIONAL = 1 };
enum MemoryType : int { DEFAULT = 0 };

struct Status;
struct Value;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct Attribute;
struct TypeInfo;
struct TensorInfo;
struct SessionOptions;
struct Domain;
struct CustomOp;

// OrtApi, a struct of pointers to functions.
struct Api {
  void (*functions[275])();
};

struct ApiBase {
  const Api*(ORT_CALL* get_api)(std::uint32_t version);
  const char*(ORT_CALL* get_version)();
};

// A function of the API: its index and type.
template <int kIndex, class Result, class... Arguments>
struct Function {
  Result operator()(const Api* api, Arguments... arguments) const {
    using Pointer = Result(ORT_CALL*)(Arguments...);
    return reinterpret_cast<Pointer>(api->functions[kIndex])(arguments...);
  }
};

constexpr Function<0, Status*, ErrorCode, const char*> create_status;
constexpr Function<26, Status*, const char*, Domain**> create_domain;
constexpr Function<27, Status*, Domain*, const CustomOp*> domain_add;
constexpr Function<28, Status*, SessionOptions*, Domain*> add_domain;
constexpr Function<51, Status*, Value*, void**> tensor_data;
constexpr Function<55, Status*, const TypeInfo*, const TensorInfo**> as_tensor_info;
constexpr Function<57, Status*, TensorInfo**> create_tensor_info;
constexpr Function<58, Status*, TensorInfo*, ElementType> set_element_type;
constexpr Function<59, Status*, TensorInfo*, const std::int64_t*, std::size_t> set_dimensions;
constexpr Function<61, Status*, const TensorInfo*, std::size_t*> dimension_count;
constexpr Function<62, Status*, const TensorInfo*, std::int64_t*, std::size_t> get_dimensions;
constexpr Function<63, Status*, const TensorInfo*, const char**, std::size_t> get_symbols;
constexpr Function<65, Status*, const Value*, TensorInfo**> tensor_info;
constexpr Function<85, Status*, const KernelInfo*, const char*, float*> get_float;
constexpr Function<86, Status*, const KernelInfo*, const char*, std::int64_t*> get_int;
constexpr Function<87, Status*, const KernelInfo*, const char*, char*, std::size_t*> get_string;
constexpr Function<88, Status*, const KernelContext*, std::size_t*> input_count;
constexpr Function<90, Status*, const KernelContext*, std::size_t, const Value**> get_input;
constexpr Function<91, Status*, KernelContext*, std::size_t, const std::int64_t*, std::size_t,
                   Value**>
    get_output;
constexpr Function<93, void, Status*> release_status;
constexpr Function<98, void, TypeInfo*> release_type_info;
constexpr Function<99, void, TensorInfo*> release_tensor_info;
constexpr Function<162, Status*, const KernelInfo*, const char*, float*, std::size_t*> get_floats;
constexpr Function<163, Status*, const KernelInfo*, const char*, std::int64_t*, std::size_t*>
    get_ints;
constexpr Function<230, Status*, const KernelInfo*, std::size_t*> info_input_count;
constexpr Function<234, Status*, const KernelInfo*, std::size_t, TypeInfo**> input_type;
constexpr Function<267, Status*, const ShapeContext*, std::size_t*> shape_input_count;
constexpr Function<268, Status*, const ShapeContext*, std::size_t, TensorInfo**> input_info;
constexpr Function<269, Status*, const ShapeContext*, const char*, const Attribute**>
    find_attribute;
constexpr Function<270, Status*, const ShapeContext*, std::size_t, const TensorInfo*>
    set_output_info;
constexpr Function<271, Status*, TensorInfo*, const char**, std::size_t> set_symbols;
constexpr Function<272, Status*, const Attribute*, AttributeType, void*, std::size_t, std::size_t*>
    read_attribute;
constexpr Function<274, Status*, const KernelContext*, void (*)(void*, std::size_t), std::size_t,
                   std::size_t, void*>
    parallel_for;

// OrtCustomOp: the fields of version 17.
struct CustomOp {
  std::uint32_t version;
  void*(ORT_CALL* create_kernel_v1)(const CustomOp*, const Api*, const KernelInfo*);
  const char*(ORT_CALL* name)(const CustomOp*);
  const char*(ORT_CALL* execution_provider)(const CustomOp*);
  ElementType(ORT_CALL* input_type)(const CustomOp*, std::size_t);
  std::size_t(ORT_CALL* input_count)(const CustomOp*);
  ElementType(ORT_CALL* output_type)(const CustomOp*, std::size_t);
  std::size_t(ORT_CALL* output_count)(const CustomOp*);
  void(ORT_CALL* compute_v1)(void*, KernelContext*);
  void(ORT_CALL* destroy_kernel)(void*);
  Characteristic(ORT_CALL* input_characteristic)(const CustomOp*, std::size_t);
  Characteristic(ORT_CALL* output_characteristic)(const CustomOp*, std::size_t);
  MemoryType(ORT_CALL* input_memory_type)(const CustomOp*, std::size_t);
  int(ORT_CALL* variadic_input_min_arity)(const CustomOp*);
  int(ORT_CALL* variadic_input_homogeneity)(const CustomOp*);
  int(ORT_CALL* variadic_output_min_arity)(const CustomOp*);
  int(ORT_CALL* variadic_output_homogeneity)(const CustomOp*);
  Status*(ORT_CALL* create_kernel)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status*(ORT_CALL* compute)(void*, KernelContext*);
  Status*(ORT_CALL* infer_shape)(const CustomOp*, ShapeContext*);
  int(ORT_CALL* start_version)(const CustomOp*);
  int(ORT_CALL* end_version)(const CustomOp*);
};

}  // namespace involution::ort
