# interfuse._native, the binding and the core in one module. torch is not needed to build it.

if(NOT EXISTS "${PROJECT_SOURCE_DIR}/csrc/bind.cpp")
  message(STATUS "interfuse: no csrc/bind.cpp yet, the module _native is not built")
  return()
endif()

find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
if(INTERFUSE_PYBIND11_INCLUDE)
  set(pybind11_headers "${INTERFUSE_PYBIND11_INCLUDE}")
else()
  set(PYBIND11_FINDPYTHON ON)
  find_package(pybind11 CONFIG REQUIRED)
  set(pybind11_headers ${pybind11_INCLUDE_DIRS})
endif()

# Not pybind11_add_module: it turns on link-time optimisation, which could move AVX-512 code into functions that every
# processor runs.
file(GLOB binding_sources CONFIGURE_DEPENDS csrc/bind/*.cpp)
Python_add_library(_native MODULE WITH_SOABI csrc/bind.cpp ${binding_sources} ${core_object_files})
target_include_directories(_native SYSTEM PRIVATE ${pybind11_headers})
target_link_libraries(_native PRIVATE interfuse_flags ${core_link_libraries})
target_compile_options(_native PRIVATE ${isa_flags_baseline})
target_compile_definitions(_native PRIVATE ${isa_definitions} $<$<BOOL:${INTERFUSE_CUDA_BUILT}>:INTERFUSE_HAVE_CUDA=1>
                           INTERFUSE_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  # Only the module's entry point is visible: a process may also hold libinterfuse.so of another version.
  set(version_script "${PROJECT_SOURCE_DIR}/cmake/native.map")
  target_link_options(_native PRIVATE "-Wl,--version-script=${version_script}")
  set_target_properties(_native PROPERTIES LINK_DEPENDS "${version_script}")
endif()
if(SKBUILD)
  install(TARGETS _native LIBRARY DESTINATION interfuse)
endif()
