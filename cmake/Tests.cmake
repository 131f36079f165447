# One program holds every C++ test. ctest runs it once per source file as the processor is, with its matrix units, and
# once held to each instruction set; a set that it lacks is reported as skipped (exit status 77).

file(GLOB test_sources CONFIGURE_DEPENDS csrc/tests/*.cpp)
if(NOT test_sources OR NOT core_objects)
  message(STATUS "interfuse: no C++ tests yet")
  return()
endif()

# What of csrc/cuda needs no CUDA runs here, with the kernels' headers, under csrc/tests/emulate.h.
file(GLOB portable_cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cpp)
add_executable(interfuse_tests ${test_sources} ${portable_cuda_sources} ${core_object_files})
target_link_libraries(interfuse_tests PRIVATE interfuse_flags ${core_link_libraries})
target_compile_options(interfuse_tests PRIVATE ${isa_flags_baseline})
target_compile_definitions(interfuse_tests PRIVATE ${isa_definitions})

foreach(source IN LISTS test_sources)
  get_filename_component(stem "${source}" NAME_WE)
  if(NOT stem MATCHES "^test_")
    continue()
  endif()
  add_test(NAME ${stem} COMMAND interfuse_tests ${stem})
  if(stem MATCHES "^test_(cuda_.*|guarded|kept)$")
    continue() # nothing in it is compiled for each set
  endif()
  foreach(isa IN LISTS INTERFUSE_ISAS)
    add_test(NAME ${stem}.${isa} COMMAND interfuse_tests ${stem})
    set_tests_properties(${stem}.${isa} PROPERTIES SKIP_RETURN_CODE 77 ENVIRONMENT "INTERFUSE_ISA=${isa}")
  endforeach()
endforeach()

# rnn's CUDA entries with its kernels executed on the CPU: the Python tests load it in the CUDA library's place.
add_library(interfuse_cuda_emulated SHARED ${portable_cuda_sources} csrc/tests/emulated_rnn.cpp csrc/common/error.cpp)
target_link_libraries(interfuse_cuda_emulated PRIVATE interfuse_flags)
target_compile_definitions(interfuse_cuda_emulated PRIVATE INTERFUSE_VERSION="${PROJECT_VERSION}" INTERFUSE_EMULATED_LIBRARY)

if(INTERFUSE_CUDA_BUILT)
  # A measurement for machines with a GPU; elsewhere it compiles.
  add_executable(interfuse_time_exchange csrc/tests/time_exchange.cu csrc/common/error.cpp)
  target_include_directories(interfuse_time_exchange PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
  target_compile_definitions(interfuse_time_exchange PRIVATE INTERFUSE_VERSION="${PROJECT_VERSION}")
  set_target_properties(interfuse_time_exchange PROPERTIES
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static)
  target_compile_options(interfuse_time_exchange PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
endif()
