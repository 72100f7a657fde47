// The part of the C ABI of XLA's FFI that bindings/jax.cpp uses, so that the build needs neither
// jaxlib, whose headers come with 80 MB of libraries, nor a jaxlib for every platform. Names follow
// xla/ffi/api/c_api.h; the declarations match versions 0.1 (jaxlib 0.7.2) to 0.3 (0.10) of the API.
// tests/native/xla_ffi.cpp compares them with the installed header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace involution::xla {

constexpr int MAJOR = 0, OLDEST_MINOR = 1;

enum ExtensionType : int { METADATA = 1 };
enum ErrorCode : int { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, UNIMPLEMENTED = 12 };
enum DataType : int { S32 = 4, S64 = 5 };
enum ArgumentType : int { BUFFER = 1 };
enum AttributeType : int { ARRAY = 1, SCALAR = 3 };
enum Stage : int { EXECUTE = 3 };

struct Error;

struct Extension {
  std::size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct Version {
  std::size_t struct_size;
  Extension* extension_start;
  int major_version, minor_version;
};

struct ErrorArguments {
  std::size_t struct_size;
  Extension* extension_start;
  const char* message;
  ErrorCode errc;
};

struct Api {  // the first fields
  std::size_t struct_size;
  Extension* extension_start;
  Version api_version;
  const void* internal_api;
  Error* (*create_error)(ErrorArguments*);
};

struct Buffer {
  std::size_t struct_size;
  Extension* extension_start;
  DataType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};

struct Span {
  const char* ptr;
  std::size_t len;
};

struct Scalar {
  DataType dtype;
  void* value;
};

struct Array {
  DataType dtype;
  std::size_t size;
  void* data;
};

struct Arguments {  // and results
  std::size_t struct_size;
  Extension* extension_start;
  std::int64_t size;
  ArgumentType* types;
  void** args;
};

struct Attributes {  // sorted by name
  std::size_t struct_size;
  Extension* extension_start;
  std::int64_t size;
  AttributeType* types;
  Span** names;
  void** attrs;
};

struct CallFrame {  // newer versions append fields
  std::size_t struct_size;
  Extension* extension_start;
  const Api* api;
  void* ctx;
  Stage stage;
  Arguments args, rets;
  Attributes attrs;
};

struct Metadata {
  std::size_t struct_size;
  Version api_version;
  std::uint32_t traits;
};

struct MetadataExtension {
  Extension extension_base;
  Metadata* metadata;
};

}  // namespace involution::xla
