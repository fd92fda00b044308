-- Raises the budgets of a day to the values that an instance has seen, if Redis has lost changes of them.
--
-- KEYS    1 the budgets
-- ARGV    1 their life in s; 2 count of changes that was seen; then two for each budget: slot, value
-- result  number of commands; 1 if values were lost, else 0
local seen = tonumber(ARGV[2])
local values = redis.call('BITFIELD', KEYS[1], 'GET', 'i64', '#0')
if values[1] >= seen then return {1, 0} end
local reads, writes = {'BITFIELD', KEYS[1]}, {'BITFIELD', KEYS[1], 'SET', 'i64', '#0', ARGV[2]}
for i = 3, #ARGV, 2 do
  for _, part in ipairs({'GET', 'i64', '#' .. (ARGV[i] + 1)}) do reads[#reads + 1] = part end
end
values = redis.call(unpack(reads))
for i, value in ipairs(values) do
  local slot, higher = ARGV[i * 2 + 1], ARGV[i * 2 + 2]
  if tonumber(higher) > value then
    for _, part in ipairs({'SET', 'i64', '#' .. (slot + 1), higher}) do writes[#writes + 1] = part end
  end
end
redis.call(unpack(writes))
redis.call('EXPIRE', KEYS[1], ARGV[1])
return {4, 1}
