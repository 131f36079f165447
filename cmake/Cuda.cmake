# CUDA kernels, in a library of their own: it is compiled wherever nvcc is, whether or not a GPU is visible, and
# its runtime is linked statically, so that it loads (and says that there is no device) without a driver.

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
set(INTERFUSE_CUDA_BUILT OFF)
if(NOT INTERFUSE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "INTERFUSE_CUDA is '${INTERFUSE_CUDA}'; it must be AUTO, ON or OFF.")
endif()
if(INTERFUSE_CUDA STREQUAL "OFF" OR NOT cuda_sources)
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # Not the GPU of this machine: the ones that are supported. Narrowed below to what the compiler knows.
  set(CMAKE_CUDA_ARCHITECTURES 80)
  set(interfuse_choose_architectures ON)
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(INTERFUSE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "INTERFUSE_CUDA is ON, but no working nvcc was found. Put nvcc on PATH, set CUDACXX to it, "
                        "or configure with -DINTERFUSE_CUDA=OFF.")
  endif()
  message(STATUS "interfuse: no nvcc found, the CUDA kernels are not built")
  return()
endif()
enable_language(CUDA)
if(interfuse_choose_architectures)
  # 80 carries PTX as well, for processors that none of the binaries fits.
  set(CMAKE_CUDA_ARCHITECTURES 80)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.0)
    list(APPEND CMAKE_CUDA_ARCHITECTURES 90a-real)
  endif()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND CMAKE_CUDA_ARCHITECTURES 100-real)
  endif()
endif()

# The checks are the core's own; the library stands alone, so it brings its copy.
add_library(interfuse_cuda SHARED ${cuda_sources} csrc/common/conv_pool_check.cpp csrc/common/error.cpp)
target_include_directories(interfuse_cuda PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
target_compile_definitions(interfuse_cuda PRIVATE INTERFUSE_VERSION="${PROJECT_VERSION}")
set_target_properties(interfuse_cuda PROPERTIES
  CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden
  CUDA_SEPARABLE_COMPILATION OFF)
target_compile_options(interfuse_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall --expt-relaxed-constexpr>)
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  target_link_options(interfuse_cuda PRIVATE -Wl,--exclude-libs,ALL)
endif()
set(INTERFUSE_CUDA_BUILT ON)
message(STATUS "interfuse: CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES} with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
if(SKBUILD)
  install(TARGETS interfuse_cuda LIBRARY DESTINATION interfuse)
endif()
