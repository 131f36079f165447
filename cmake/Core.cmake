# The torch-free core. csrc/cpu/*.cpp are compiled once per instruction set, everything else once, for the
# plainest processor of the architecture; the core chooses among the copies by cpuid when it is loaded.

file(GLOB kernel_sources CONFIGURE_DEPENDS csrc/cpu/*.cpp)
file(GLOB common_sources CONFIGURE_DEPENDS csrc/common/*.cpp csrc/*.cpp)
list(FILTER common_sources EXCLUDE REGEX "/csrc/bind\\.cpp$")

add_library(interfuse_flags INTERFACE)
target_include_directories(interfuse_flags INTERFACE "${PROJECT_SOURCE_DIR}/csrc")
target_compile_definitions(interfuse_flags INTERFACE INTERFUSE_VERSION="${PROJECT_VERSION}")
target_compile_options(interfuse_flags INTERFACE -Wall -Wextra $<$<BOOL:${INTERFUSE_WERROR}>:-Werror>)
# -ffast-math is never used: NaN and Inf must pass as in torch, and linking with it sets flush-to-zero for the
# whole process that loads the library.
if(INTERFUSE_SANITIZE)
  string(REPLACE ";" "," sanitizers "${INTERFUSE_SANITIZE}")
  set(sanitizer_flags -fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1)
  set(instrumented "$<NOT:$<BOOL:$<TARGET_PROPERTY:INTERFUSE_UNSANITIZED>>>")
  target_compile_options(interfuse_flags INTERFACE "$<${instrumented}:${sanitizer_flags}>")
  target_link_options(interfuse_flags INTERFACE ${sanitizer_flags})
endif()

# GCC links libgomp by its plain soname. torch loads a library of that soname too, so both share one pool of threads;
# a second runtime (libomp, or a bundled copy) would spin on the same cores.
find_package(OpenMP REQUIRED COMPONENTS CXX)
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang" AND NOT APPLE)
  message(WARNING "Clang links libomp, a second OpenMP runtime beside the libgomp of torch on Linux: both spin on the "
                  "same cores and slow each other down. Set CXX=g++ for a build that shares a process with torch.")
endif()

set(INTERFUSE_ISAS baseline)
set(isa_flags_baseline)
set(isa_definitions)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  # -march=x86-64 overrides a -march=native from the environment: the baseline must run everywhere.
  set(isa_flags_baseline -march=x86-64)
  if(INTERFUSE_X86_ISAS)
    list(APPEND INTERFUSE_ISAS avx2 avx512)
    set(isa_flags_avx2 -march=x86-64 -mavx2 -mfma -mf16c)
    set(isa_flags_avx512 -march=x86-64 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl
                         -mprefer-vector-width=512)
    set(isa_definitions INTERFUSE_HAVE_X86_ISAS=1)
  endif()
endif()

set(core_objects)
if(common_sources)
  add_library(interfuse_common OBJECT ${common_sources})
  target_link_libraries(interfuse_common PRIVATE interfuse_flags)
  target_compile_options(interfuse_common PRIVATE ${isa_flags_baseline})
  target_compile_definitions(interfuse_common PRIVATE ${isa_definitions})
  list(APPEND core_objects interfuse_common)
endif()
if(kernel_sources)
  foreach(isa IN LISTS INTERFUSE_ISAS)
    add_library(interfuse_cpu_${isa} OBJECT ${kernel_sources})
    target_link_libraries(interfuse_cpu_${isa} PRIVATE interfuse_flags)
    target_compile_definitions(interfuse_cpu_${isa} PRIVATE INTERFUSE_ISA=${isa} ${isa_definitions})
    # Neither flag changes a value; both let loops with comparisons and sqrt become vector code.
    target_compile_options(interfuse_cpu_${isa} PRIVATE ${isa_flags_${isa}} -ffp-contract=fast
                                                        -fno-math-errno -fno-trapping-math)
    if(INTERFUSE_SANITIZE AND isa STREQUAL "avx512")
      # Its loads and stores of parts of a vector are masked instructions, which no sanitizer looks into, and GCC 12
      # takes the longest over it: guard pages watch its memory, and the same sources are instrumented for the other
      # instruction sets.
      set_target_properties(interfuse_cpu_${isa} PROPERTIES INTERFUSE_UNSANITIZED ON)
    elseif(INTERFUSE_SANITIZE)
      # The scopes of thousands of inlined temporaries would take longer than all other checks together.
      target_compile_options(interfuse_cpu_${isa} PRIVATE -fno-sanitize-address-use-after-scope)
    endif()
    list(APPEND core_objects interfuse_cpu_${isa})
  endforeach()
endif()

if(NOT core_objects)
  message(STATUS "interfuse: no sources in csrc yet, the core is not built")
  return()
endif()

# In this order: should two of them offer the same symbol after all, the linker keeps the copy that runs everywhere.
set(core_object_files)
foreach(target IN LISTS core_objects)
  list(APPEND core_object_files $<TARGET_OBJECTS:${target}>)
  target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
endforeach()
find_package(Threads REQUIRED)
set(core_link_libraries Threads::Threads OpenMP::OpenMP_CXX)

if(NOT SKBUILD)
  add_library(interfuse ${core_object_files})
  add_library(interfuse::interfuse ALIAS interfuse)
  target_include_directories(interfuse PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc>
                                              $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_link_libraries(interfuse PRIVATE ${core_link_libraries} $<BUILD_INTERFACE:interfuse_flags>)
  set_target_properties(interfuse PROPERTIES LINKER_LANGUAGE CXX VERSION ${PROJECT_VERSION}
                                             SOVERSION ${PROJECT_VERSION_MAJOR})
endif()
