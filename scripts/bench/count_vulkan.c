// Compile a compute shader with a Vulkan driver and print the driver's assembly. Nothing runs on the device.
//
// count_vulkan SHADER.spv BINDINGS PUSH_BYTES SUBGROUP [CONSTANT ...]
//   SUBGROUP: the size to require, 0 for the driver's choice. CONSTANT: 32-bit values of the specialization constants 0, 1, ...
// The first line names the device, the second the driver; then come its statistics as `name = value`, an empty line, and the assembly.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vulkan/vulkan.h>

#define MAX_BINDINGS 16
#define MAX_CONSTANTS 16

static void check(VkResult result, const char * what) {
    if (result != VK_SUCCESS) {
        fprintf(stderr, "%s failed: VkResult %d\n", what, result);
        exit(1);
    }
}

static VkPhysicalDevice first_device(VkInstance instance) {
    uint32_t n = 1;
    VkPhysicalDevice device = VK_NULL_HANDLE;
    const VkResult result = vkEnumeratePhysicalDevices(instance, &n, &device);
    if (n == 0 || (result != VK_SUCCESS && result != VK_INCOMPLETE)) {
        fprintf(stderr, "no Vulkan device: VkResult %d\n", result);
        exit(1);
    }
    return device;
}

// All features that the device has, and its assembly.
static VkDevice open_device(VkPhysicalDevice physical) {
    VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR executable = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PIPELINE_EXECUTABLE_PROPERTIES_FEATURES_KHR
    };
    VkPhysicalDeviceVulkan13Features v13 = { .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_FEATURES, .pNext = &executable };
    VkPhysicalDeviceVulkan12Features v12 = { .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES, .pNext = &v13 };
    VkPhysicalDeviceVulkan11Features v11 = { .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES, .pNext = &v12 };
    VkPhysicalDeviceFeatures2 features = { .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, .pNext = &v11 };
    vkGetPhysicalDeviceFeatures2(physical, &features);
    if (!executable.pipelineExecutableInfo) {
        fprintf(stderr, "the driver does not show its assembly (VK_KHR_pipeline_executable_properties)\n");
        exit(1);
    }
    const float priority = 1;
    const VkDeviceQueueCreateInfo queue = { .sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO,
                                            .queueCount = 1,
                                            .pQueuePriorities = &priority };
    const char * extension = VK_KHR_PIPELINE_EXECUTABLE_PROPERTIES_EXTENSION_NAME;
    const VkDeviceCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
        .pNext = &features,
        .queueCreateInfoCount = 1,
        .pQueueCreateInfos = &queue,
        .enabledExtensionCount = 1,
        .ppEnabledExtensionNames = &extension,
    };
    VkDevice device;
    check(vkCreateDevice(physical, &info, NULL, &device), "vkCreateDevice");
    return device;
}

static VkShaderModule load_shader(VkDevice device, const char * path) {
    FILE * f = fopen(path, "rb");
    static uint32_t words[1 << 20];
    const size_t bytes = f ? fread(words, 1, sizeof words, f) : 0;
    if (bytes == 0 || bytes == sizeof words) {
        fprintf(stderr, "cannot read %s, or it has %zu bytes or more\n", path, sizeof words);
        exit(1);
    }
    fclose(f);
    const VkShaderModuleCreateInfo info = { .sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO, .codeSize = bytes, .pCode = words };
    VkShaderModule module;
    check(vkCreateShaderModule(device, &info, NULL, &module), "vkCreateShaderModule");
    return module;
}

static VkPipelineLayout make_layout(VkDevice device, uint32_t bindings, uint32_t push_bytes) {
    VkDescriptorSetLayoutBinding binding[MAX_BINDINGS];
    for (uint32_t i = 0; i < bindings; ++i) {
        binding[i] = (VkDescriptorSetLayoutBinding){ i, VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, 1, VK_SHADER_STAGE_COMPUTE_BIT, NULL };
    }
    const VkDescriptorSetLayoutCreateInfo set_info = { .sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO,
                                                       .bindingCount = bindings,
                                                       .pBindings = binding };
    VkDescriptorSetLayout set;
    check(vkCreateDescriptorSetLayout(device, &set_info, NULL, &set), "vkCreateDescriptorSetLayout");
    const VkPushConstantRange range = { VK_SHADER_STAGE_COMPUTE_BIT, 0, push_bytes };
    const VkPipelineLayoutCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO,
        .setLayoutCount = 1,
        .pSetLayouts = &set,
        .pushConstantRangeCount = push_bytes ? 1 : 0,
        .pPushConstantRanges = &range,
    };
    VkPipelineLayout layout;
    check(vkCreatePipelineLayout(device, &info, NULL, &layout), "vkCreatePipelineLayout");
    return layout;
}

static VkPipeline compile(VkDevice device, const char * path, VkPipelineLayout layout, uint32_t subgroup, uint32_t constants,
                          uint32_t * value) {
    VkSpecializationMapEntry entry[MAX_CONSTANTS];
    for (uint32_t i = 0; i < constants; ++i) {
        entry[i] = (VkSpecializationMapEntry){ i, 4 * i, 4 };
    }
    const VkSpecializationInfo specialization = { constants, entry, 4 * (size_t) constants, value };
    VkPipelineShaderStageRequiredSubgroupSizeCreateInfo required = {
        .sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_REQUIRED_SUBGROUP_SIZE_CREATE_INFO, .requiredSubgroupSize = subgroup
    };
    const VkComputePipelineCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
        .flags = VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR | VK_PIPELINE_CREATE_CAPTURE_INTERNAL_REPRESENTATIONS_BIT_KHR,
        .stage = { .sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO,
                   .pNext = subgroup ? &required : NULL,
                   .flags = subgroup ? VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT : 0,
                   .stage = VK_SHADER_STAGE_COMPUTE_BIT,
                   .module = load_shader(device, path),
                   .pName = "main",
                   .pSpecializationInfo = &specialization },
        .layout = layout,
    };
    VkPipeline pipeline;
    check(vkCreateComputePipelines(device, VK_NULL_HANDLE, 1, &info, NULL, &pipeline), "vkCreateComputePipelines");
    return pipeline;
}

static void print_statistics(VkDevice device, const VkPipelineExecutableInfoKHR * info) {
    const PFN_vkGetPipelineExecutableStatisticsKHR get =
        (PFN_vkGetPipelineExecutableStatisticsKHR) vkGetDeviceProcAddr(device, "vkGetPipelineExecutableStatisticsKHR");
    VkPipelineExecutableStatisticKHR statistic[64];
    uint32_t n = 64;
    for (uint32_t i = 0; i < n; ++i) {
        statistic[i] = (VkPipelineExecutableStatisticKHR){ .sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_STATISTIC_KHR };
    }
    check(get(device, info, &n, statistic), "vkGetPipelineExecutableStatisticsKHR");
    for (uint32_t i = 0; i < n; ++i) {
        if (statistic[i].format == VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_UINT64_KHR) {
            printf("%s = %llu\n", statistic[i].name, (unsigned long long) statistic[i].value.u64);
        }
    }
}

static void print_assembly(VkDevice device, const VkPipelineExecutableInfoKHR * info) {
    const PFN_vkGetPipelineExecutableInternalRepresentationsKHR get =
        (PFN_vkGetPipelineExecutableInternalRepresentationsKHR) vkGetDeviceProcAddr(device,
                                                                                    "vkGetPipelineExecutableInternalRepresentationsKHR");
    VkPipelineExecutableInternalRepresentationKHR text[16];
    uint32_t n = 16;
    for (uint32_t i = 0; i < n; ++i) {
        text[i] =
            (VkPipelineExecutableInternalRepresentationKHR){ .sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INTERNAL_REPRESENTATION_KHR };
    }
    check(get(device, info, &n, text), "vkGetPipelineExecutableInternalRepresentationsKHR");
    for (uint32_t i = 0; i < n; ++i) {
        text[i].pData = calloc(1, text[i].dataSize + 1);
    }
    check(get(device, info, &n, text), "vkGetPipelineExecutableInternalRepresentationsKHR");
    for (uint32_t i = 0; i < n; ++i) {
        if (strcmp(text[i].name, "Assembly") == 0) {
            printf("\n%s\n", (const char *) text[i].pData);
        }
    }
}

int main(int argc, char ** argv) {
    if (argc < 5 || atoi(argv[2]) > MAX_BINDINGS || argc - 5 > MAX_CONSTANTS) {
        fprintf(stderr, "count_vulkan SHADER.spv BINDINGS PUSH_BYTES SUBGROUP [CONSTANT ...]\n");
        return 2;
    }
    uint32_t value[MAX_CONSTANTS];
    for (int i = 5; i < argc; ++i) {
        value[i - 5] = (uint32_t) strtoul(argv[i], NULL, 0);
    }
    const VkApplicationInfo app = { .sType = VK_STRUCTURE_TYPE_APPLICATION_INFO, .apiVersion = VK_API_VERSION_1_3 };
    const VkInstanceCreateInfo info = { .sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO, .pApplicationInfo = &app };
    VkInstance instance;
    check(vkCreateInstance(&info, NULL, &instance), "vkCreateInstance");
    const VkPhysicalDevice physical = first_device(instance);
    VkPhysicalDeviceVulkan12Properties driver = { .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_PROPERTIES };
    VkPhysicalDeviceProperties2 properties = { .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, .pNext = &driver };
    vkGetPhysicalDeviceProperties2(physical, &properties);
    printf("%s\n%s %s\n", properties.properties.deviceName, driver.driverName, driver.driverInfo);

    const VkDevice device = open_device(physical);
    const VkPipelineLayout layout = make_layout(device, (uint32_t) atoi(argv[2]), (uint32_t) atoi(argv[3]));
    const VkPipeline pipeline = compile(device, argv[1], layout, (uint32_t) atoi(argv[4]), (uint32_t) (argc - 5), value);
    const VkPipelineExecutableInfoKHR executable = { .sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INFO_KHR, .pipeline = pipeline };
    print_statistics(device, &executable);
    print_assembly(device, &executable);
    return 0;
}
