-- Raises the budgets of a day to the values that an instance has seen, if Redis has lost changes of them.
--
-- Each instance has seen the budgets of its own tasks only. So the first one that notices a loss names it, and the
-- others raise their values too, once for each name, though the count of changes is right by then.
--
-- KEYS    1 the budgets; 2 name of their last loss
-- ARGV    1 life of the budgets in s; 2 count of changes that was seen; 3 name for a loss that is noticed now; 4 name
--         of the last loss that this instance has handled, or ''; 5 life of the name in s; then two for each budget:
--         slot, value
-- result  number of commands; 1 if values were lost, else 0; name of the last loss, or ''
local seen, name = tonumber(ARGV[2]), redis.pcall('GET', KEYS[2])
if type(name) ~= 'string' then name = '' end
local values = redis.call('BITFIELD', KEYS[1], 'GET', 'i64', '#0')
local is_lost = values[1] < seen
if not is_lost and (name == '' or name == ARGV[4]) then return {2, 0, name} end
local reads, writes = {'BITFIELD', KEYS[1]}, {'BITFIELD', KEYS[1]}
if is_lost then
  writes = {'BITFIELD', KEYS[1], 'SET', 'i64', '#0', ARGV[2]}
  name = ARGV[3]
  redis.call('SET', KEYS[2], name, 'EX', ARGV[5])
end
for i = 6, #ARGV, 2 do
  for _, part in ipairs({'GET', 'i64', '#' .. (ARGV[i] + 1)}) do reads[#reads + 1] = part end
end
values = redis.call(unpack(reads))
for i, value in ipairs(values) do
  local slot, higher = ARGV[i * 2 + 4], ARGV[i * 2 + 5]
  if tonumber(higher) > value then
    for _, part in ipairs({'SET', 'i64', '#' .. (slot + 1), higher}) do writes[#writes + 1] = part end
  end
end
if #writes == 2 then return {3, 0, name} end
redis.call(unpack(writes))
redis.call('EXPIRE', KEYS[1], ARGV[1])
return {6, 1, name}
