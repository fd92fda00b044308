-- Adds a client, and its webhooks, to the clients of an unfinished task.
--
-- KEYS    1 record; 2 clients (see joined.lua)
-- ARGV    1 epoch; 2 the first clients of the task; 3 names to add; 4 most bytes of names; 5 life in ms
-- result  0 if this epoch of the task is over; 1 if the names were there; 2 if a name was added
local record = redis.pcall('GET', KEYS[1])
local state, epoch = string.match(type(record) == 'string' and record or '', '^%d+ (%l+) %S+ (%d+) ')
if (state ~= 'pending' and state ~= 'processing') or epoch ~= ARGV[1] then return 0 end
local names, added = joined_clients(KEYS[2], epoch, ARGV[2]), ''
for name in string.gmatch(ARGV[3], '%S+') do
  if not find_client(names, name) then added = added .. ' ' .. name end
end
if added == '' then return 1 end
if #names + #added > tonumber(ARGV[4]) then added = UNCOUNTED end
if added == UNCOUNTED and find_client(names, '*') then return 1 end
redis.call('SET', KEYS[2], epoch .. names .. added, 'PX', ARGV[5])
return 2
